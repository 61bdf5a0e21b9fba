package liveness

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// The observer beats each half second, nodes renew each second, grace is 4 s.
// A script is a list of lines "<from>-<to> <who>...": who is heard in each
// second of that span; "echo" is the observer. Verdicts are asked at the end.
func TestLedger(t *testing.T) {
	for _, tc := range []struct {
		name   string
		nodes  string
		script []string
		want   string
	}{
		{"all renew", "a b c", []string{"0-20 echo a b c"}, "a alive, b alive, c alive"},
		{"nothing known at the start", "a b", []string{"0-1 echo"}, "a unproven, b unproven"},
		{"silent from the start, after one grace period", "a b", []string{"0-5 echo b"}, "a lost 0.5s, b alive"},
		{"one falls silent: not yet", "a b c", []string{"0-10 echo a b c", "10-13 echo b c"}, "a alive, b alive, c alive"},
		{"one falls silent: lost", "a b c", []string{"0-10 echo a b c", "10-14 echo b c"}, "a lost 0.5s, b alive, c alive"},
		{"one falls silent: for long", "a b c", []string{"0-10 echo a b c", "10-20 echo b c"}, "a lost 6.5s, b alive, c alive"},
		{"comes back", "a b c", []string{"0-10 echo a b c", "10-20 echo b c", "20-21 echo a b c"}, "a alive, b alive, c alive"},
		{"API away for an hour: nobody is lost", "a b c", []string{"0-10 echo a b c", "3600-3603 echo"}, "a alive, b alive, c alive"},
		{"API away for an hour, then one stays silent", "a b c", []string{"0-10 echo a b c", "3600-3605 echo b c"}, "a lost 0.5s, b alive, c alive"},
		{"a lost node gets its time again after an outage", "a b c", []string{"0-10 echo a b c", "10-18 echo b c", "100-101 echo"}, "a lost 0.5s, b alive, c alive"},
		{"observer paused for three seconds counts one beat or two", "a b c", []string{"0-10 echo a b c", "13-15 echo b c"}, "a alive, b alive, c alive"},
		{"two of three at once: storm", "a b c", []string{"0-10 echo a b c", "10-20 echo c"}, "a lost 6.5s, b lost 6.5s, c alive; storm a b"},
		{"two of three, long after each other: no storm", "a b c", []string{"0-10 echo a b c", "10-40 echo b c", "40-50 echo c"}, "a lost 36.5s, b lost 6.5s, c alive"},
		{"one of two: no storm", "a b", []string{"0-10 echo a b", "10-20 echo b"}, "a lost 6.5s, b alive"},
		{"half of four: no storm", "a b c d", []string{"0-10 echo a b c d", "10-20 echo a b"}, "a alive, b alive, c lost 6.5s, d lost 6.5s"},
		{"storm lasts as long as they are away", "a b c", []string{"0-10 echo a b c", "10-99 echo c"}, "a lost 1m25.5s, b lost 1m25.5s, c alive; storm a b"},
		{"storm ends when one is back", "a b c", []string{"0-10 echo a b c", "10-20 echo c", "20-22 echo b c"}, "a lost 8.5s, b alive, c alive"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := New(Config{})
			names := strings.Fields(tc.nodes)
			l.Expect(names)
			for _, n := range names {
				l.Renewed(n, "from before")
			}
			for _, line := range tc.script {
				play(t, l, line)
			}
			if got := verdicts(l, names); got != tc.want {
				t.Errorf("\n got %s\nwant %s", got, tc.want)
			}
		})
	}
}

var origin = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func play(t *testing.T, l *Ledger, line string) {
	t.Helper()
	who := strings.Fields(line)
	var from, to int
	if _, err := fmt.Sscanf(who[0], "%d-%d", &from, &to); err != nil {
		t.Fatal(err)
	}
	for beat := 2 * from; beat < 2*to; beat++ {
		now := origin.Add(time.Duration(beat) * 500 * time.Millisecond)
		for _, w := range who[1:] {
			switch {
			case w == "echo":
				l.Echo(now)
			case beat%2 == 0:
				l.Renewed(w, now.String())
			}
		}
	}
}

func verdicts(l *Ledger, names []string) string {
	var out []string
	for _, n := range names {
		switch v := l.Judge(n); v.State {
		case Alive:
			out = append(out, n+" alive")
		case Lost:
			out = append(out, n+" lost "+v.For.String())
		default:
			out = append(out, n+" unproven")
		}
	}
	s := strings.Join(out, ", ")
	if storm := l.Storm(); len(storm) > 0 {
		s += "; storm " + strings.Join(storm, " ")
	}
	return strings.ReplaceAll(s, "500ms", "0.5s")
}

func TestForgottenNodes(t *testing.T) {
	l := New(Config{})
	l.Expect([]string{"a", "b", "c"})
	play(t, l, "0-10 echo a b c")
	play(t, l, "10-20 echo c")
	l.Expect([]string{"b", "c"})
	play(t, l, "20-21 echo c")
	if got, want := verdicts(l, []string{"a", "b", "c"}), "a unproven, b lost 7.5s, c alive"; got != want {
		t.Errorf("got %s, want %s: a Node that was deleted is nobody's loss, and ends the storm", got, want)
	}
}

func TestSameStampIsNoLife(t *testing.T) {
	l := New(Config{})
	l.Expect([]string{"a"})
	for i := range 20 {
		l.Renewed("a", "same")
		l.Echo(origin.Add(time.Duration(i) * 500 * time.Millisecond))
	}
	if v := l.Judge("a"); v.State != Lost {
		t.Errorf("a lease that is listed again and again without being renewed keeps its node alive: %+v", v)
	}
}

package vm

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		line, word, test, seconds string
		ok                        bool
	}{
		{"--- PASS: TestApply (1.16s)", "PASS", "TestApply", "1.16", true},
		{"    --- FAIL: TestStory/services (31.19s)", "FAIL", "TestStory/services", "31.19", true},
		{"--- SKIP: TestKey (0.00s)", "SKIP", "TestKey", "0.00", true},
		{"    story_test.go:7: --- FAIL: no (1s)", "", "", "", false},
		{"--- 10.244.1.2 ping statistics ---", "", "", "", false},
		{"PASS", "", "", "", false},
	} {
		test, v, ok := parse(c.line)
		if ok != c.ok || ok && (v != verdict{c.word, c.seconds} || test != c.test) {
			t.Errorf("%q: %s %v %v, want %s %s", c.line, test, v, ok, c.word, c.test)
		}
	}
}

func TestRead(t *testing.T) {
	got, err := read(strings.NewReader(`{"Action":"run","Package":"m/p","Test":"A"}
{"Action":"pass","Package":"m/p","Test":"A/b","Elapsed":0.5}
{"Action":"pass","Package":"m/p","Test":"A","Elapsed":1}
{"Action":"skip","Package":"m/q","Test":"B"}
{"Action":"pass","Package":"m/p","Elapsed":1.5}
go: no such module
`))
	want := verdicts{"p/A": {"PASS", "1.00"}, "p/A/b": {"PASS", "0.50"}, "q/B": {"SKIP", "0.00"}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(verdict{})); diff != "" || err != nil {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
}

func TestCompare(t *testing.T) {
	pass := verdict{"PASS", "1.00"}
	for _, c := range []struct {
		name        string
		here, there verdicts
		want        string
	}{
		{"the same", verdicts{"p/A": pass, "p/X": pass}, verdicts{"p/A": pass}, ""},
		{"one fails", verdicts{"p/A": pass, "p/X": pass}, verdicts{"p/A": {"FAIL", "1.00"}}, ""},
		{"a subtest is missing", verdicts{"p/A": pass, "p/A/b": pass, "p/X": pass}, verdicts{"p/A": pass}, "p/A/b ran here and not in a guest"},
		{"subtests of an excused one", verdicts{"p/X": pass, "p/X/b": pass}, verdicts{}, ""},
		{"a skip is no run", verdicts{"p/A": pass, "p/X": pass}, verdicts{"p/A": {"SKIP", "0.00"}}, "p/A ran here and not in a guest"},
		{"one too many", verdicts{"p/X": pass}, verdicts{"p/A": pass}, "p/A ran in a guest and not here"},
		{"an excuse of nobody", verdicts{}, verdicts{}, "p/X has a reason to run only here, and did not"},
		{"an excuse that is none", verdicts{"p/X": pass}, verdicts{"p/X": pass}, "p/X has a reason to run only here, and did not"},
	} {
		if got := strings.Join(compare(c.here, c.there, map[string]string{"p/X": "why"}), "; "); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

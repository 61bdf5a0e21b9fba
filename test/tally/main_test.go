package main

import (
	"io"
	"strings"
	"testing"
)

func TestTally(t *testing.T) {
	const pass = `{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Elapsed":1.5}
`
	for _, c := range []struct {
		name, in string
		well     bool
		says     string
	}{
		{"all pass", pass, true, "pass  p "},
		{"nothing ran", "", false, "no test ran"},
		{"package without tests", pass + `{"Action":"skip","Package":"q"}` + "\n", true, "1 tests passed"},
		{"a skip is no pass", pass + `{"Action":"output","Package":"p","Test":"B","Output":"needs nft\n"}
{"Action":"skip","Package":"p","Test":"B"}
`, false, "needs nft"},
		{"a failure shows its output", pass + `{"Action":"output","Package":"p","Test":"B","Output":"got 1\n"}
{"Action":"fail","Package":"p","Test":"B"}
`, false, "got 1"},
		{"a build that fails", pass + `{"Action":"build-fail","ImportPath":"q"}` + "\n", false, "FAIL q does not build"},
		{"a package that dies", pass + `{"Action":"fail","Package":"q"}` + "\n", false, "FAIL q"},
		{"words of go itself", "go: no such module\n" + pass, true, "go: no such module"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			tl := &tally{out: &out, output: map[string]*strings.Builder{}}
			if err := tl.read(strings.NewReader(c.in)); err != nil {
				t.Fatal(err)
			}
			if got := tl.sum(); got != c.well || !strings.Contains(out.String(), c.says) {
				t.Errorf("well %v, want %v; printed\n%swant in it %q", got, c.well, out.String(), c.says)
			}
		})
	}
}

func FuzzTally(f *testing.F) {
	f.Add([]byte(`{"Action":"output","Output":"x"}`))
	f.Fuzz(func(_ *testing.T, line []byte) {
		tl := &tally{out: io.Discard, output: map[string]*strings.Builder{}}
		tl.line(line)
		tl.sum()
	})
}

func TestSteps(t *testing.T) {
	var out strings.Builder
	tl := &tally{out: &out, steps: true, output: map[string]*strings.Builder{}}
	for _, line := range []string{
		`{"Action":"output","Package":"p","Test":"A/nodes_Ready","Output":"=== RUN   A/nodes_Ready\n"}`,
		`{"Action":"output","Package":"p","Test":"A/nodes_Ready","Output":"    x_test.go:7: after 2.9s\n"}`,
		`{"Action":"pass","Package":"p","Test":"A/nodes_Ready","Elapsed":3.1}`,
		`{"Action":"pass","Package":"p","Test":"A","Elapsed":3.2}`,
	} {
		tl.line([]byte(line))
	}
	got := strings.Join(strings.Fields(out.String()), " ")
	if want := "ok 3.10s nodes Ready after 2.9s"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
}

// Command tally reads `go test -json` and prints what a person wants to see of
// it: a line a package, and the whole output of what failed. It ends non-zero
// if a test failed or was skipped: where it is used nothing may be missing, and
// a skip would be a hole nobody sees. With -steps it prints a line a passed
// subtest as well, with its time and what it logged.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is a line of `go test -json` (go doc test2json).
type event struct {
	Action     string
	Package    string
	ImportPath string // of build output
	Test       string
	Output     string
	Elapsed    float64
}

// A tally is what was seen so far.
type tally struct {
	out     io.Writer
	steps   bool
	output  map[string]*strings.Builder // by package and test
	skipped []string
	failed  []string
	passed  int
}

func main() {
	t := &tally{out: os.Stdout, output: map[string]*strings.Builder{}}
	flag.BoolVar(&t.steps, "steps", false, "print a line a passed subtest, with its time and what it logged")
	flag.Parse()
	if err := t.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "tally:", err)
		os.Exit(1)
	}
	if !t.sum() {
		os.Exit(1)
	}
}

func (t *tally) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			t.line(line)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (t *tally) line(line []byte) {
	var e event
	if json.Unmarshal(line, &e) != nil || e.Action == "" {
		fmt.Fprintf(t.out, "%s", line) // go's own words, as on a broken import
		return
	}
	t.count(e)
}

func (t *tally) count(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		b := t.output[key]
		if b == nil {
			b = &strings.Builder{}
			t.output[key] = b
		}
		b.WriteString(e.Output)
	case "build-output":
		fmt.Fprint(t.out, e.Output)
	case "build-fail":
		t.failed = append(t.failed, e.ImportPath+" does not build")
	case "pass", "fail", "skip":
		t.end(e, key)
	}
}

// end is a test or, without a name, a package that is over.
func (t *tally) end(e event, key string) {
	output := ""
	if b := t.output[key]; b != nil {
		output = b.String()
	}
	delete(t.output, key)
	switch {
	case e.Test == "" && e.Action == "skip":
		return // a package without tests
	case e.Test == "":
		fmt.Fprintf(t.out, "%-4s  %-50s %6.1fs\n", e.Action, e.Package, e.Elapsed)
		if e.Action == "fail" {
			t.failed = append(t.failed, e.Package)
			fmt.Fprint(t.out, output)
		}
	case e.Action == "pass":
		t.passed++
		if _, step, ok := strings.Cut(e.Test, "/"); ok && t.steps {
			fmt.Fprintf(t.out, "ok  %7.2fs  %-70s %s\n", e.Elapsed, strings.ReplaceAll(step, "_", " "), logged(output))
		}
	case e.Action == "fail":
		t.failed = append(t.failed, key)
		fmt.Fprint(t.out, output)
	case e.Action == "skip":
		t.skipped = append(t.skipped, key)
		fmt.Fprint(t.out, output)
	}
}

// logged is what a test logged, without where and without go's own lines.
func logged(output string) string {
	var said []string
	for line := range strings.Lines(output) {
		if _, text, ok := strings.Cut(strings.TrimSpace(line), ".go:"); ok {
			_, text, _ = strings.Cut(text, ": ")
			said = append(said, text)
		}
	}
	return strings.Join(said, "; ")
}

// sum prints the end and reports whether all is well.
func (t *tally) sum() bool {
	fmt.Fprintf(t.out, "%d tests passed, %d failed, %d skipped\n", t.passed, len(t.failed), len(t.skipped))
	slices.Sort(t.failed)
	for _, f := range slices.Compact(t.failed) {
		fmt.Fprintln(t.out, "FAIL", f)
	}
	for _, s := range t.skipped {
		fmt.Fprintln(t.out, "SKIP", s, "(install what it names: make deps)")
	}
	if t.passed == 0 {
		fmt.Fprintln(t.out, "no test ran")
	}
	return t.passed > 0 && len(t.failed)+len(t.skipped) == 0
}

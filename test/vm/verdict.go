package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
)

// A verdict on a test: what go test says of it, and how long it took in seconds.
type verdict struct {
	word    string // PASS, FAIL or SKIP
	seconds string
}

// verdicts by the last element of the package's path, a slash, and the test.
type verdicts map[string]verdict

// parse reads "--- PASS: TestX (0.01s)", also of subtests.
func parse(line string) (test string, v verdict, ok bool) {
	rest, ok := strings.CutPrefix(strings.TrimLeft(line, " "), "--- ")
	if !ok {
		return "", v, false
	}
	v.word, rest, ok = strings.Cut(rest, ": ")
	test, took, _ := strings.Cut(rest, " (")
	var paren bool
	v.seconds, paren = strings.CutSuffix(took, "s)")
	return test, v, ok && paren
}

// runHere runs the tests of packages on this machine, where the device is
// userspace's, as make test does: what that found a moment ago is found again
// in go's cache, if all tests are asked for.
func runHere(ctx context.Context, run string, packages []string) (verdicts, error) {
	args := []string{"test", "-vet=off", "-p", "2", "-timeout", "15m", "-json"}
	if run != "" {
		args = append(args, "-run", run)
	}
	for _, pkg := range packages {
		args = append(args, "./"+pkg)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = "../.."
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	found, err := read(out)
	if err2 := cmd.Wait(); err == nil {
		err = err2
	}
	if err != nil {
		return found, fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
	}
	return found, nil
}

// read what go test -json prints.
func read(r io.Reader) (verdicts, error) {
	found := verdicts{}
	for lines := bufio.NewScanner(r); ; {
		if !lines.Scan() {
			return found, lines.Err()
		}
		var e struct {
			Action, Package, Test string
			Elapsed               float64
		}
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Test == "" {
			continue // go's own words
		}
		if word := strings.ToUpper(e.Action); word == "PASS" || word == "FAIL" || word == "SKIP" {
			found[path.Base(e.Package)+"/"+e.Test] = verdict{word, fmt.Sprintf("%.2f", e.Elapsed)}
		}
	}
}

// compare says which tests did not run on both, but for those that have a
// reason to run only here, and which reasons are of no test.
func compare(here, there verdicts, hereOnly map[string]string) (differences []string) {
	excused := func(test string) bool {
		pkg, name, _ := strings.Cut(test, "/")
		name, _, _ = strings.Cut(name, "/")
		_, ok := hereOnly[pkg+"/"+name]
		return ok
	}
	ran := func(of verdicts, test string) bool { return of[test].word != "" && of[test].word != "SKIP" }
	for test := range here {
		if ran(here, test) && !ran(there, test) && !excused(test) {
			differences = append(differences, test+" ran here and not in a guest")
		}
	}
	for test := range there {
		if ran(there, test) && !ran(here, test) {
			differences = append(differences, test+" ran in a guest and not here")
		}
	}
	for test := range hereOnly {
		if !ran(here, test) || ran(there, test) {
			differences = append(differences, test+" has a reason to run only here, and did not")
		}
	}
	slices.Sort(differences)
	return differences
}

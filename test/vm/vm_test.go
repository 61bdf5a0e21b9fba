package vm

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestEnv says which tests run: those that match it, as with go test -run, but
// without subtests; or "core", all but the changes of keys; or all when it is
// empty.
const TestEnv = "MESHD_VM_TEST"

// limit of a guest's life, in the time of this machine.
const limit = 45 * time.Minute

// A suite is a package whose tests run in a guest: those that match run and do
// not match skip; empty is all, and none.
type suite struct{ pkg, run, skip string }

// parts have no machines; all of their tests take half a minute.
var parts = []suite{{pkg: "pkg/datapath/wireguard"}, {pkg: "pkg/datapath/route"}, {pkg: "pkg/datapath/firewall"}}

// What the tests of machines divide into, by the time they take.
const (
	machines = "pkg/datapath"
	changes  = "TestRotation|TestSecondIsWatched" // of keys: half of all time
	story    = "TestStory"
	paths    = "TestPathsAreRepaired|TestBlackHole|TestSegmentsFitTheTunnel|TestNothingIsCut|TestBehindAddressTranslator|TestOneOfAThousand"
)

func only(patterns ...string) string { return "^(" + strings.Join(patterns, "|") + ")$" }

// guests to run beside each other.
func guests() [][]suite {
	first := func(but ...string) []suite {
		return append(slices.Clone(parts), suite{pkg: machines, skip: only(but...)})
	}
	switch test := os.Getenv(TestEnv); test {
	case "":
		return [][]suite{first(changes, story), {{pkg: machines, run: only(changes, story)}}}
	case "core":
		return [][]suite{first(changes, story, paths), {{pkg: machines, run: only(story, paths)}}}
	default:
		var all []suite
		for _, s := range append(slices.Clone(parts), suite{pkg: machines}) {
			all = append(all, suite{pkg: s.pkg, run: test})
		}
		return [][]suite{all}
	}
}

// hereOnly are the tests that no guest runs, and why.
var hereOnly = map[string]string{
	"wireguard/TestUserspaceProcess":    "the kernel's device has no process",
	"wireguard/TestRemove":              "the kernel's device has no process",
	"wireguard/TestProcessStandsStill":  "the kernel's device has no process",
	"wireguard/TestLinkOutlivesProcess": "the kernel's device has no process",
	"wireguard/TestWithoutAnyWireGuard": "the guest's kernel has WireGuard",
	"wireguard/TestPossible":            "the guest's kernel has WireGuard",
	"datapath/TestTunnelsWithoutTime":   "the kernel's device has no process that could stand still",
	"datapath/TestEveryOrder":           "asks no kernel, and takes an emulated processor minutes",
	"datapath/TestEveryRuleIsNeeded":    "asks no kernel, and takes an emulated processor minutes",
}

// The tests of the datapath on a kernel with WireGuard, and the same ones here,
// where the device is a process of ours: each runs on both or stands above.
func TestKernelDatapath(t *testing.T) {
	if missing := Missing(); len(missing) > 0 {
		t.Skipf("needs %s", strings.Join(missing, ", "))
	}
	if test := os.Getenv(TestEnv); strings.Contains(test, "/") {
		t.Fatalf("%s is %q: name tests, not subtests", TestEnv, test)
	}
	deb, err := FindKernel()
	if err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	kernel, err := ReadKernel(ctx, deb)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	init := compile(t, dir)
	var mu sync.Mutex
	var wait sync.WaitGroup
	there := verdicts{}
	for i, suites := range guests() {
		wait.Go(func() {
			got := runThere(ctx, t, suites, Config{Kernel: kernel, Dir: filepath.Join(dir, fmt.Sprint("guest", i)), Init: init}, filepath.Join(dir, "tests"))
			mu.Lock()
			defer mu.Unlock()
			maps.Copy(there, got)
		})
	}
	wait.Wait()
	if t.Failed() {
		return
	}
	run := os.Getenv(TestEnv)
	if run == "core" {
		run = ""
	}
	here, err := runHere(ctx, run, packages())
	if err != nil {
		t.Errorf("the same tests, here: %v", err)
	}
	for test, v := range here {
		if v.word == "FAIL" {
			t.Errorf("%s fails here", test)
		}
	}
	excuses := maps.Clone(hereOnly)
	maps.DeleteFunc(excuses, func(test, _ string) bool { return !chosen(test) })
	maps.DeleteFunc(here, func(test string, _ verdict) bool { return !chosen(test) })
	for _, difference := range compare(here, there, excuses) {
		t.Error(difference)
	}
	for test, why := range excuses {
		t.Run("only here/"+test, func(t *testing.T) { t.Log(why) })
	}
}

// chosen reports whether a test is one of those that shall run.
func chosen(test string) bool {
	pkg, name, _ := strings.Cut(test, "/")
	name, _, _ = strings.Cut(name, "/")
	matches := func(pattern string) bool { return pattern != "" && regexp.MustCompile(pattern).MatchString(name) }
	return slices.ContainsFunc(slices.Concat(guests()...), func(s suite) bool {
		return filepath.Base(s.pkg) == pkg && (s.run == "" || matches(s.run)) && !matches(s.skip)
	})
}

// packages of the guests, each once.
func packages() (list []string) {
	for _, s := range slices.Concat(guests()...) {
		if !slices.Contains(list, s.pkg) {
			list = append(list, s.pkg)
		}
	}
	return list
}

// in a guest, from the folder of compiled tests.
func (s suite) in(tests string) Run {
	base := filepath.Base(s.pkg)
	var skip []string
	for test := range hereOnly {
		if pkg, name, _ := strings.Cut(test, "/"); pkg == base {
			skip = append(skip, "^"+name+"$")
		}
	}
	slices.Sort(skip)
	if s.skip != "" {
		skip = append(skip, s.skip)
	}
	return Run{
		Program: filepath.Join(tests, base+".test"), Folder: filepath.Join("../..", s.pkg), Env: []string{"MESHD_TEST_BACKEND=kernel", "MESHD_TEST_RATE=250"},
		// Hours of the guest; here it ends by limit.
		Args: []string{"-test.v", "-test.timeout=2h", "-test.run=" + s.run, "-test.skip=" + strings.Join(skip, "|")},
	}
}

// runThere boots a guest and turns the tests it runs into tests of ours.
func runThere(ctx context.Context, t *testing.T, suites []suite, cfg Config, tests string) verdicts {
	there := verdicts{}
	for _, s := range suites {
		cfg.Runs = append(cfg.Runs, s.in(tests))
	}
	if err := os.Mkdir(cfg.Dir, 0o755); err != nil {
		t.Error(err)
		return nil
	}
	guest, err := Boot(ctx, cfg)
	if err != nil {
		t.Error(err)
		return nil
	}
	defer guest.Close()
	for _, s := range suites {
		f := follower{t: t, pkg: filepath.Base(s.pkg), verdicts: there}
		if status, err := guest.Next(f.line); err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("it was ended after %s", limit)
			}
			t.Errorf("guest, in %s: %v\n%s\nits console:\n%s", s.pkg, err, f.said.String(), guest.Console())
			return there
		} else if status != 0 {
			t.Errorf("%s: exit status %d\n%s", s.pkg, status, f.said.String())
		}
	}
	return there
}

// A follower makes tests of ours out of what a test binary prints.
type follower struct {
	t        *testing.T
	pkg      string
	verdicts verdicts
	said     strings.Builder // since the last test that is no subtest ended
}

func (f *follower) line(line string) {
	fmt.Fprintln(&f.said, line)
	test, v, ok := parse(line)
	if !ok {
		return
	}
	name := f.pkg + "/" + test
	f.verdicts[name] = v
	f.t.Run(name, func(t *testing.T) {
		t.Logf("after %s s of the guest's time", v.seconds)
		switch v.word {
		case "FAIL":
			t.Errorf("in the guest:\n%s", f.said.String())
		case "SKIP":
			t.Skipf("in the guest:\n%s", f.said.String())
		}
	})
	f.said.Reset()
}

// compile makes the test binaries, in dir/tests, and init.
func compile(t *testing.T, dir string) (init string) {
	t.Helper()
	init = filepath.Join(dir, "init")
	tests := filepath.Join(dir, "tests") + "/"
	if err := os.Mkdir(tests, 0o755); err != nil {
		t.Fatal(err)
	}
	build := []string{"test", "-c", "-vet=off", "-ldflags=-s -w", "-o", tests}
	for _, pkg := range packages() {
		build = append(build, "./"+pkg)
	}
	for _, args := range [][]string{{"build", "-ldflags=-s -w", "-o", init, "./test/vm/init"}, build} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir, cmd.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	return init
}

package vm

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// limit of a guest's life. On two idle cores the tests take six minutes, on
// busy ones twenty.
const limit = 30 * time.Minute

// suites are the packages whose tests run in the guest, and what of them
// cannot: each with its reason.
var suites = []struct{ pkg, skip string }{
	{pkg: "pkg/datapath/wireguard", skip: "^(TestWithoutAnyWireGuard|TestUserspaceProcess)$"}, // there is one
	{pkg: "pkg/datapath/route"},
	{pkg: "pkg/datapath/firewall"},
	{pkg: "pkg/datapath", skip: "^TestOneOfAThousand$"}, // five minutes for an emulated processor, and seen to pass
}

// The tests of the datapath, on a kernel with WireGuard.
func TestKernelDatapath(t *testing.T) {
	if missing := Missing(); len(missing) > 0 {
		t.Skipf("needs %s", strings.Join(missing, ", "))
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
	cfg := Config{Kernel: kernel, Dir: dir, Init: compile(t, dir)}
	for _, s := range suites {
		args := []string{"-test.v", "-test.timeout=25m"}
		if s.skip != "" {
			args = append(args, "-test.skip="+s.skip)
		}
		cfg.Runs = append(cfg.Runs, Run{
			Program: filepath.Join(dir, "tests", filepath.Base(s.pkg)+".test"), Folder: filepath.Join("../..", s.pkg),
			Args: args, Env: []string{"MESHD_TEST_BACKEND=kernel"},
		})
	}
	guest, err := Boot(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	for _, s := range suites {
		if !t.Run(filepath.Base(s.pkg), func(t *testing.T) { follow(t, guest) }) && ctx.Err() != nil {
			t.Fatalf("the guest was ended after %s", limit)
		}
	}
	if t.Failed() {
		t.Logf("console of the guest:\n%s", guest.Console())
	}
}

// follow turns what a test binary prints into tests of ours.
func follow(t *testing.T, guest *Guest) {
	tests := 0
	status, err := guest.Next(func(line string) {
		t.Log(line)
		if verdict, test, ok := result(line); ok {
			tests++
			t.Run(test, func(t *testing.T) {
				switch verdict {
				case "FAIL":
					t.Fail()
				case "SKIP":
					t.Skip("skipped in the guest")
				}
			})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if status != 0 || tests == 0 {
		t.Errorf("exit status %d after %d tests", status, tests)
	}
}

// result reads "--- PASS: TestX (0.01s)", also of subtests.
func result(line string) (verdict, test string, ok bool) {
	rest, ok := strings.CutPrefix(strings.TrimLeft(line, " "), "--- ")
	if !ok {
		return "", "", false
	}
	verdict, rest, ok = strings.Cut(rest, ": ")
	test, _, paren := strings.Cut(rest, " (")
	return verdict, test, ok && paren
}

func TestResult(t *testing.T) {
	for _, c := range []struct {
		line, verdict, test string
		ok                  bool
	}{
		{"--- PASS: TestApply (1.16s)", "PASS", "TestApply", true},
		{"    --- FAIL: TestStory/services (31.19s)", "FAIL", "TestStory/services", true},
		{"--- SKIP: TestKey (0.00s)", "SKIP", "TestKey", true},
		{"    story_test.go:7: --- FAIL: no (1s)", "", "", false},
		{"--- 10.244.1.2 ping statistics ---", "", "", false},
		{"PASS", "", "", false},
	} {
		if verdict, test, ok := result(c.line); ok != c.ok || ok && (verdict != c.verdict || test != c.test) {
			t.Errorf("%q: %s %s %v, want %s %s %v", c.line, verdict, test, ok, c.verdict, c.test, c.ok)
		}
	}
}

func TestRoot(t *testing.T) {
	r := newRoot()
	r.add("/lib64/ld.so", 0o755, nil)
	r.add("/usr/bin/ip", 0o755, nil)
	r.dir("/tests/a/b")
	for _, name := range []string{"usr/lib64/ld.so", "usr/lib64", "usr/bin/ip", "tests", "tests/a/b"} {
		if _, ok := r.files[name]; !ok {
			t.Errorf("no %s", name)
		}
	}
	var archive bytes.Buffer
	if err := r.write(&archive); err != nil || archive.Len()%4 != 0 {
		t.Errorf("%d bytes, %v", archive.Len(), err)
	}
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
	for _, s := range suites {
		build = append(build, "./"+s.pkg)
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

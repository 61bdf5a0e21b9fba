package volume

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func files(pairs ...string) map[string]file {
	out := map[string]file{}
	for i := 0; i < len(pairs); i += 2 {
		out[pairs[i]] = file{data: []byte(pairs[i+1]), mode: 0o644}
	}
	return out
}

// visible is what a container sees: path=content, hidden names left out.
func visible(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	var walk func(rel string)
	walk = func(rel string) {
		entries, err := os.ReadDir(filepath.Join(dir, rel))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			path := filepath.Join(rel, e.Name())
			if strings.HasPrefix(e.Name(), "..") {
				continue
			}
			if st, err := os.Stat(filepath.Join(dir, path)); err != nil {
				t.Fatal(err)
			} else if st.IsDir() {
				walk(path)
				continue
			}
			b, err := os.ReadFile(filepath.Join(dir, path))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, path+"="+string(b))
		}
	}
	walk("")
	slices.Sort(out)
	return out
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	for i, step := range []struct {
		files   map[string]file
		changed bool
		want    string
	}{
		{files("a", "1", "d/b", "2"), true, "[a=1 d/b=2]"},
		{files("a", "1", "d/b", "2"), false, "[a=1 d/b=2]"},
		{files("a", "1", "d/c", "3"), true, "[a=1 d/c=3]"},
		{files("e", "4"), true, "[e=4]"},
		{files(), true, "[]"},
		{files(), false, "[]"},
	} {
		changed, err := replace(dir, step.files, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(visible(t, dir)); changed != step.changed || got != step.want {
			t.Errorf("step %d: changed %v, %s; want %v, %s", i, changed, got, step.changed, step.want)
		}
		hidden, _ := filepath.Glob(filepath.Join(dir, "..*"))
		if len(hidden) != 2 {
			t.Errorf("step %d leaves %v", i, hidden)
		}
	}
}

// From any mess to exactly the wish.
func TestReplaceClearsWhatACrashLeft(t *testing.T) {
	dir := t.TempDir()
	if _, err := replace(dir, files("a", "1"), nil); err != nil {
		t.Fatal(err)
	}
	for _, mess := range []string{"..vleft", newLink, "stranger"} {
		if err := os.WriteFile(filepath.Join(dir, mess), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	if _, err := replace(dir, files("a", "1"), nil); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(visible(t, dir)); got != "[a=1]" {
		t.Errorf("got %s", got)
	}
}

func jwt(issued, expires time.Time) string {
	return "h." + base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"iat":%d,"exp":%d}`, issued.Unix(), expires.Unix())) + ".s"
}

func TestTokenIsKeptRefreshedAndOutlivesTheAPI(t *testing.T) {
	now := time.Now()
	var calls int
	var next string
	v := New(Config{Dir: t.TempDir(), Token: func(context.Context, *v1.Pod, string, int64) (string, error) {
		calls++
		if next == "" {
			return "", errors.New("the API is away")
		}
		return next, nil
	}})
	dir := t.TempDir()
	get := func() (string, error) {
		g := &gathering{v: v, ctx: t.Context(), pod: &v1.Pod{}, dir: dir, mode: 0o644, files: map[string]file{}}
		err := g.token(&v1.ServiceAccountTokenProjection{Path: "token"})
		return string(g.files["token"].data), err
	}
	if _, err := get(); err == nil {
		t.Error("no token and no API is no error")
	}
	young, old := jwt(now.Add(-time.Minute), now.Add(time.Hour)), jwt(now.Add(-55*time.Minute), now.Add(5*time.Minute))
	next = young
	if got, err := get(); err != nil || got != young {
		t.Errorf("got %q, %v", got, err)
	}
	write := func(s string) {
		if err := os.WriteFile(filepath.Join(dir, "token"), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(young)
	calls = 0
	if _, err := get(); err != nil || calls != 0 {
		t.Errorf("a young token was asked for again (%v)", err)
	}
	write(old)
	if got, err := get(); err != nil || got != young {
		t.Errorf("an old token was kept: %v", err)
	}
	next = ""
	if got, err := get(); err != nil || got != old {
		t.Errorf("with the API away the old token must serve on: %q, %v", got, err)
	}
}

func FuzzTokenTimes(f *testing.F) {
	f.Add(jwt(time.Unix(0, 0), time.Unix(10, 0)))
	f.Fuzz(func(t *testing.T, s string) {
		if refresh, end := tokenTimes(s); refresh.After(end) {
			t.Errorf("%q: refreshed after its end", s)
		}
	})
}

func TestHostPathTypes(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		kind v1.HostPathType
		ok   bool
	}{
		{dir, v1.HostPathDirectory, true}, {file, v1.HostPathDirectory, false}, {file, v1.HostPathFile, true},
		{dir + "/no", v1.HostPathFile, false}, {dir + "/no", v1.HostPathUnset, true},
		{dir + "/new/dir", v1.HostPathDirectoryOrCreate, true}, {dir + "/newfile", v1.HostPathFileOrCreate, true},
		{"/dev/null", v1.HostPathCharDev, true}, {file, v1.HostPathSocket, false}, {"/dev/null", v1.HostPathBlockDev, false},
	} {
		if err := hostPath(&v1.HostPathVolumeSource{Path: c.path, Type: &c.kind}); (err == nil) != c.ok {
			t.Errorf("%s as %q: %v", c.path, c.kind, err)
		}
	}
}

// A volume that points out of itself does not let its pod out.
func TestSubPathStaysInside(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	vol, out := t.TempDir(), t.TempDir()
	if err := os.Symlink(out, filepath.Join(vol, "escape")); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{"escape", "escape/x", "../x", "/etc"} {
		if err := bindSubPath(vol, sub, filepath.Join(t.TempDir(), "at"), nil); err == nil {
			t.Errorf("%q was mounted", sub)
		}
	}
}

// A pipe the pod put there is bound like a file, and nobody waits at it.
func TestSubPathMayBeAPipe(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	vol, at := t.TempDir(), filepath.Join(t.TempDir(), "at")
	if err := unix.Mkfifo(filepath.Join(vol, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := bindSubPath(vol, "pipe", at, nil); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(at, unix.MNT_DETACH)
	if st, err := os.Stat(at); err != nil || st.Mode()&os.ModeNamedPipe == 0 {
		t.Errorf("it is %v, %v", st, err)
	}
}

func TestTeardownTakesNothingElse(t *testing.T) {
	v := New(Config{Dir: t.TempDir()})
	for _, uid := range []string{"", "a/b"} {
		if v.Teardown("") == nil {
			t.Errorf("%q is taken for a pod", uid)
		}
	}
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Spec: v1.PodSpec{Volumes: []v1.Volume{{Name: "e", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}}}}}
	if _, err := v.Setup(t.Context(), pod, Facts{}); err != nil {
		t.Fatal(err)
	}
	if got, err := v.Pods(); err != nil || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
	if err := v.Teardown("u"); err != nil {
		t.Error(err)
	}
	if got, err := v.Pods(); err != nil || len(got) != 0 {
		t.Errorf("got %v, %v", got, err)
	}
}

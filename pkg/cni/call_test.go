package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// The library's skel package is the oracle: what it lets through to a verb we
// let through, and what it refuses we refuse with the same code.
func TestACallIsReadAsTheLibraryReadsIt(t *testing.T) {
	const conf = `{"cniVersion":"1.1.0","name":"meshd","type":"mesh"}`
	id := "CNI_CONTAINERID=web"
	for _, c := range []struct{ env, stdin string }{
		{"CNI_COMMAND=ADD " + id + " CNI_NETNS=/x CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=ADD " + id + " CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=ADD " + id + " CNI_NETNS=/x", conf},
		{"CNI_COMMAND=ADD CNI_NETNS=/x CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=../web CNI_NETNS=/x CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=.web CNI_NETNS=/x CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=W_e.b-1 CNI_NETNS=/x CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=wäb CNI_NETNS=/x CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=web\n CNI_NETNS=/x CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=ADD " + id + " CNI_NETNS=/x CNI_IFNAME=..", conf},
		{"CNI_COMMAND=ADD " + id + " CNI_NETNS=/x CNI_IFNAME=a:b", conf},
		{"CNI_COMMAND=ADD " + id + " CNI_NETNS=/x CNI_IFNAME=a\u00a0b", conf},
		{"CNI_COMMAND=ADD " + id + " CNI_NETNS=/x CNI_IFNAME=exactly15bytes_", conf},
		{"CNI_COMMAND=ADD " + id + " CNI_NETNS=/x CNI_IFNAME=sixteen_bytes_xx", conf},
		{"CNI_COMMAND=DEL " + id + " CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=DEL " + id, conf},
		{"CNI_COMMAND=CHECK " + id + " CNI_NETNS=/x CNI_IFNAME=eth0", conf},
		{"CNI_COMMAND=CHECK " + id + " CNI_NETNS=/x CNI_IFNAME=eth0", strings.Replace(conf, "1.1.0", "0.3.1", 1)},
		{"CNI_COMMAND=CHECK " + id + " CNI_NETNS=/x CNI_IFNAME=eth0", strings.Replace(conf, "1.1.0", "0.4.0", 1)},
		{"CNI_COMMAND=GC", conf},
		{"CNI_COMMAND=GC", strings.Replace(conf, "1.1.0", "1.0.0", 1)},
		{"CNI_COMMAND=STATUS", conf},
		{"CNI_COMMAND=STATUS", strings.Replace(conf, "1.1.0", "1.0.0", 1)},
		{"CNI_COMMAND=STATUS", strings.Replace(conf, "1.1.0", "0.2.0", 1)},
		{"CNI_COMMAND=STATUS", strings.Replace(conf, "1.1.0", "2.0.0", 1)},
		{"CNI_COMMAND=STATUS", strings.Replace(conf, "1.1.0", "", 1)},
		{"CNI_COMMAND=STATUS", `{"cniVersion":"1.1.0"}`},
		{"CNI_COMMAND=STATUS", strings.Replace(conf, "meshd", "me/shd", 1)},
		{"CNI_COMMAND=STATUS", strings.Replace(conf, "meshd", "..", 1)},
		{"CNI_COMMAND=STATUS", conf[:20]},
		{"CNI_COMMAND=STATUS", ``},
		{"CNI_COMMAND=STATUS", `[]`},
		{"CNI_COMMAND=VERSION", ``},
		{"CNI_COMMAND=add", conf},
		{"CNI_COMMAND=", conf},
	} {
		env := map[string]string{"CNI_PATH": "/x"}
		for _, pair := range strings.Split(c.env, " ") {
			key, value, _ := strings.Cut(pair, "=")
			env[key] = value
		}
		called, printed, code := ours(env, c.stdin)
		wantCalled, wantPrinted, wantCode := theirs(t, env, c.stdin)
		if called != wantCalled || printed != wantPrinted || code != wantCode {
			t.Errorf("%q with %s: verb %q, code %d, prints %q; the library: %q, %d, %q", c.env, c.stdin, called, code, printed, wantCalled, wantCode, wantPrinted)
		}
	}
}

// ours says which verb was called, what was printed, and the error's code.
func ours(env map[string]string, stdin string) (called, printed string, code uint) {
	verb := func(name string) func(*conf, *call) error {
		return func(_ *conf, c *call) error {
			called = name + " " + c.containerID + " " + c.ifName + " " + c.netns + " " + c.args + " " + string(c.stdin)
			return nil
		}
	}
	var out bytes.Buffer
	v := verbs{add: verb("add"), del: verb("del"), check: verb("check"), gc: verb("gc"), status: verb("status")}
	_, err := v.run(func(key string) string { return env[key] }, strings.NewReader(stdin), &out)
	var e *types.Error
	if errors.As(err, &e) {
		code = e.Code
	}
	return called, out.String(), code
}

func theirs(t *testing.T, env map[string]string, stdin string) (called, printed string, code uint) {
	t.Helper()
	for _, key := range []string{"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"} {
		t.Setenv(key, env[key])
	}
	in, out := filepath.Join(t.TempDir(), "in"), filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(in, []byte(stdin), 0o600); err != nil {
		t.Fatal(err)
	}
	restore := redirect(t, in, out)
	verb := func(name string) func(*skel.CmdArgs) error {
		return func(c *skel.CmdArgs) error {
			called = name + " " + c.ContainerID + " " + c.IfName + " " + c.Netns + " " + c.Args + " " + string(c.StdinData)
			return nil
		}
	}
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{Add: verb("add"), Del: verb("del"), Check: verb("check"), GC: verb("gc"), Status: verb("status")},
		version.PluginSupports(versions...), "")
	restore()
	if err != nil {
		code = err.Code
	}
	text, readErr := os.ReadFile(out)
	if readErr != nil {
		t.Fatal(readErr)
	}
	return called, string(text), code
}

// redirect gives the process other standard files until it is undone.
func redirect(t *testing.T, in, out string) (restore func()) {
	t.Helper()
	stdin, stdout := os.Stdin, os.Stdout
	i, err := os.Open(in)
	if err != nil {
		t.Fatal(err)
	}
	o, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	os.Stdin, os.Stdout = i, o
	return func() {
		os.Stdin, os.Stdout = stdin, stdout
		i.Close()
		o.Close()
	}
}

// What the library wants and the specification does not: CNI_PATH.
func TestACallNeedsNoPath(t *testing.T) {
	if called, _, code := ours(map[string]string{"CNI_COMMAND": "STATUS"}, `{"cniVersion":"1.1.0","name":"meshd"}`); called == "" || code != 0 {
		t.Errorf("verb %q, code %d", called, code)
	}
}

func TestAnErrorIsInTheVersionInUse(t *testing.T) {
	for _, c := range []struct {
		conf *conf
		want string
	}{
		{nil, "1.1.0"},
		{&conf{CNIVersion: "0.4.0"}, "0.4.0"},
	} {
		var got struct {
			CNIVersion, Msg, Details string
			Code                     uint
		}
		text := errorText(c.conf, invalid("mtu", "too small"))
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatal(err)
		}
		if got.CNIVersion != c.want || got.Code != types.ErrInvalidNetworkConfig || got.Details != "mtu: too small" || got.Msg == "" {
			t.Errorf("%s", text)
		}
	}
}

func FuzzCall(f *testing.F) {
	f.Add("ADD", "web", "/x", "eth0", "", `{"cniVersion":"1.1.0","name":"meshd","cni.dev/valid-attachments":null}`)
	f.Add("GC", "", "", "", "a=b", `{"cniVersion":"1.1.0","name":"meshd","cni.dev/attachments":[{"containerID":"x"}]}`)
	f.Add("VERSION", "", "", "", "", "")
	f.Fuzz(func(t *testing.T, verb, id, netns, ifName, args, stdin string) {
		env := map[string]string{"CNI_COMMAND": verb, "CNI_CONTAINERID": id, "CNI_NETNS": netns, "CNI_IFNAME": ifName, "CNI_ARGS": args}
		called, printed, code := ours(env, stdin)
		if called == "" && printed == "" && code == 0 {
			t.Errorf("%q: neither a verb nor an error", env)
		}
		if attachment := []string{"ADD", "DEL", "CHECK"}; called != "" && slices.Contains(attachment, verb) && (!isName(id) || validIfName(ifName) != nil) {
			t.Errorf("let through %q", env)
		}
		if c, err := parseConf([]byte(stdin)); err == nil {
			if _, err := c.validAttachments(); err != nil {
				wantCoded(t, err)
			}
		}
	})
}

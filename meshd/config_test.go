package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func TestConfigFileAndFlags(t *testing.T) {
	for _, c := range []struct {
		name, file string
		args       []string
		check      func(serverConfig) bool
		want       string // part of the error
	}{
		{"a file", "node-name: m1\nnode-ip: [192.0.2.1, \"2001:db8::1\"]\nnode-label: {disk: ssd}\nevict-after: 7s\n", nil,
			func(c serverConfig) bool {
				return c.NodeName == "m1" && slices.Equal(c.NodeIPs, []string{"192.0.2.1", "2001:db8::1"}) && c.NodeLabels["disk"] == "ssd" && c.EvictAfter.String() == "7s"
			}, ""},
		{"the command line wins", "node-name: file\nnode-ip: [192.0.2.1]\n", []string{"--node-name", "line"},
			func(c serverConfig) bool { return c.NodeName == "line" && c.NodeIPs[0] == "192.0.2.1" }, ""},
		{"an unknown setting", "node-nmae: m1\n", nil, nil, "node-nmae: no such setting; known are advertise-address"},
		{"a bad value", "listen-port: many\n", nil, nil, `listen-port: invalid argument "many"`},
		{"twice the same key", "node-name: a\nnode-name: b\n", nil, nil, "already set"},
		{"no YAML", "\tx", nil, nil, "yaml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var cfg serverConfig
			flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
			cfg.flags(flags)
			if err := flags.Parse(c.args); err != nil {
				t.Fatal(err)
			}
			err := applyConfig([]byte(c.file), flags)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("error %v, want %q", err, c.want)
				}
				return
			}
			if err != nil || !c.check(cfg) {
				t.Errorf("%v: %+v", err, cfg)
			}
		})
	}
}

func TestComplete(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		want string // part of the error; empty: fine
	}{
		{"as it comes", nil, ""},
		{"host bits", []string{"--pod-cidr", "10.244.0.1/16"}, "10.244.0.0/16 would be right"},
		{"two of a family", []string{"--service-cidr", "10.96.0.0/16,10.97.0.0/16"}, "more than one range of a family"},
		{"overlap", []string{"--pod-cidr", "10.0.0.0/8"}, "overlap"},
		{"the machine inside", []string{"--pod-cidr", "192.0.2.0/24"}, "contains this machine's own address 192.0.2.1"},
		{"a bad name", []string{"--node-name", "M_1"}, `node name "M_1"`},
		{"a bad address", []string{"--node-ip", "host"}, `--node-ip "host": want an IPv4 or IPv6 address`},
		{"no port", []string{"--listen", "6443"}, `--listen "6443": want address:port`},
		{"what is not to be masqueraded", []string{"--no-masquerade", "198.51.100.0/24,203.0.113.0/24"}, ""},
		{"the same with host bits", []string{"--no-masquerade", "198.51.100.1/24"}, "198.51.100.0/24 would be right"},
		{"a port out of range", []string{"--listen-port", "70000"}, "want 1 to 65534"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var cfg serverConfig
			flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
			cfg.flags(flags)
			if err := flags.Parse(append([]string{"--node-name", "m1", "--node-ip", "192.0.2.1"}, c.args...)); err != nil {
				t.Fatal(err)
			}
			if slices.Contains(c.args, "--node-ip") {
				cfg.NodeIPs = cfg.NodeIPs[1:]
			}
			err := cfg.complete()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func FuzzApplyConfig(f *testing.F) {
	f.Add([]byte("node-ip: [192.0.2.1]\nnode-label: {a: b}\n"))
	f.Add([]byte("evict-after: [[]]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var cfg serverConfig
		flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
		cfg.flags(flags)
		_ = applyConfig(b, flags)
	})
}

// No pod may take these as its host port.
func TestOwnPorts(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  nodeConfig
		want string
	}{
		{"server", nodeConfig{ListenPort: 51820, AgentPort: 10250, apiPort: 6443}, "51820/udp 51821/udp 51820/tcp 10250/tcp 6443/tcp"},
		{"node", nodeConfig{ListenPort: 51999, AgentPort: 10251}, "51999/udp 52000/udp 51999/tcp 10251/tcp"},
		{"node of somebody else's Kubernetes", nodeConfig{ListenPort: 51820}, "51820/udp 51821/udp 51820/tcp 10250/tcp 6443/tcp"},
	} {
		if got := strings.Join(c.cfg.ownPorts(), " "); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

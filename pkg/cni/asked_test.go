package cni

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"meshd.dev/pkg/cni/rtnl"
	"meshd.dev/pkg/mesh"
)

// What a runtime may ask for, and what is refused, by key.
func TestWishes(t *testing.T) {
	const base = `{"cniVersion":"1.1.0","name":"meshd","ranges":["10.244.1.0/24","fd00:10:244:1::/64"],"mtu":1420,"table":"meshd","reservedPorts":["51820/udp"],"dns":{"nameservers":["192.0.2.53"]},"runtimeConfig":{%s}}`
	for _, c := range []struct{ name, asked, want string }{
		{"nothing", ``, "ranges 10.244.1.0/24 fd00:10:244:1::/64 dns 192.0.2.53"},
		{"ips", `"ips":["10.244.1.5/24","fd00:10:244:1::5"]`, "ips 10.244.1.5 fd00:10:244:1::5 ranges"},
		{"ips by annotation", `"io.kubernetes.cri.pod-annotations":{"meshd.dev/ips":"10.244.1.5, fd00:10:244:1::5","meshd.dev/mac":"0e:00:00:00:00:05","a":"b"}`, "ips 10.244.1.5 fd00:10:244:1::5 mac 0e:00:00:00:00:05"},
		{"ips of the runtime win", `"ips":["10.244.1.6"],"io.kubernetes.cri.pod-annotations":{"meshd.dev/ips":"10.244.1.5"}`, "ips 10.244.1.6 ranges"},
		{"two ips of one family", `"ips":["10.244.1.5","10.244.1.6"]`, "at most one of each"},
		{"annotation that is none", `"io.kubernetes.cri.pod-annotations":{"meshd.dev/ips":"ten"}`, `"ten" is not an address`},
		{"mac", `"mac":"0e:00:00:00:00:07"`, "mac 0e:00:00:00:00:07"},
		{"multicast mac", `"mac":"01:00:00:00:00:07"`, "unicast Ethernet address"},
		{"ports", `"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"},{"hostPort":53,"containerPort":5353,"protocol":"UDP","hostIP":"192.0.2.1"},{"hostPort":9,"containerPort":9,"protocol":"sctp","hostIP":"::"}]`,
			"ports 8080/TCP→80 192.0.2.1:53/UDP→5353 [::]:9/SCTP→9"},
		{"a port twice", `"portMappings":[{"hostPort":80,"containerPort":80},{"hostPort":80,"containerPort":80,"protocol":"tcp"}]`, "ports 80/TCP→80 ranges"},
		{"a port to two", `"portMappings":[{"hostPort":80,"containerPort":80},{"hostPort":80,"containerPort":81}]`, "leads to both 80 and 81"},
		{"port 0", `"portMappings":[{"hostPort":0,"containerPort":80}]`, "want 1 to 65535"},
		{"port too large", `"portMappings":[{"hostPort":80,"containerPort":65536}]`, "want 1 to 65535"},
		{"a port of the machine", `"portMappings":[{"hostPort":51820,"containerPort":80,"protocol":"udp","hostIP":"192.0.2.1"}]`, "51820/udp is one that this machine itself is reached at"},
		{"that port of another protocol", `"portMappings":[{"hostPort":51820,"containerPort":80}]`, "ports 51820/TCP→80"},
		{"protocol", `"portMappings":[{"hostPort":80,"containerPort":80,"protocol":"icmp"}]`, "want tcp, udp or sctp"},
		{"hostIP", `"portMappings":[{"hostPort":80,"containerPort":80,"hostIP":"here"}]`, "want an address of this node"},
		{"bandwidth", `"bandwidth":{"ingressRate":8000000,"ingressBurst":800000,"egressRate":16000000,"egressBurst":4294967295}`, "to 1000000/100000 from 2000000/200000"},
		{"bandwidth without burst", `"bandwidth":{"ingressRate":1000000}`, "to 125000/65536"},
		{"bandwidth as little as Kubernetes allows", `"bandwidth":{"ingressRate":1000,"ingressBurst":2147483647}`, "to 125/65536"},
		{"bandwidth with less", `"bandwidth":{"ingressRate":999}`, "ingressRate 999: want bits a second, at least 1000"},
		{"bandwidth with a burst no packet fits", `"bandwidth":{"ingressRate":1000000,"ingressBurst":8000}`, "no packet would fit"},
		{"burst without a rate", `"bandwidth":{"egressBurst":8000}`, "egressRate 0: want bits a second"},
		{"negative rate", `"bandwidth":{"egressRate":-1}`, "cannot read network configuration"},
		{"ipRanges", `"ipRanges":[[{"subnet":"10.244.9.0/24","rangeStart":"10.244.9.100","rangeEnd":"10.244.9.110"}]]`, "ranges 10.244.9.0/24 from 10.244.9.100 to 10.244.9.110 fd00:10:244:1::/64"},
		{"ipRanges of both", `"ipRanges":[[{"subnet":"10.244.9.0/24"},{"subnet":"10.244.8.0/24"}],[{"subnet":"fd00:9::/64"}]]`, "ranges 10.244.9.0/24 10.244.8.0/24 fd00:9::/64 dns"},
		{"ipRanges mixed", `"ipRanges":[[{"subnet":"10.244.9.0/24"},{"subnet":"fd00:9::/64"}]]`, "want one family in each"},
		{"ipRanges of one family twice", `"ipRanges":[[{"subnet":"10.244.9.0/24"}],[{"subnet":"10.244.8.0/24"}]]`, "two sets of one family"},
		{"ipRanges with a gateway", `"ipRanges":[[{"subnet":"10.244.9.0/24","gateway":"10.244.9.1"}]]`, "leave it out"},
		{"ipRanges the wrong way round", `"ipRanges":[[{"subnet":"10.244.9.0/24","rangeStart":"10.244.9.9","rangeEnd":"10.244.9.8"}]]`, "is behind rangeEnd"},
		{"ipRanges outside", `"ipRanges":[[{"subnet":"10.244.9.0/24","rangeStart":"10.244.8.9"}]]`, "not an address in it"},
		{"dns", `"dns":{"servers":["192.0.2.1","2001:db8::1"],"searches":["a.example"],"options":["ndots:5"]}`, "dns 192.0.2.1 2001:db8::1 search a.example options ndots:5"},
		{"dns that is none", `"dns":{"servers":["resolver.example"]}`, "want an address"},
		{"what it cannot do", `"infinibandGUID":"c2:11"`, `"infinibandGUID" is nothing this plugin can do`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := wishesText(fmt.Sprintf(base, c.asked))
			if !strings.Contains(got, c.want) {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
	if got := wishesText(strings.Replace(fmt.Sprintf(base, `"portMappings":[{"hostPort":80,"containerPort":80}]`), `"table":"meshd",`, "", 1)); !strings.Contains(got, "chain portmap behind this plugin") {
		t.Errorf("host ports without a table: %s", got)
	}
}

func wishesText(stdin string) string {
	c, err := parseConf([]byte(stdin))
	if err == nil {
		err = c.complete()
	}
	var w wishes
	if err == nil {
		w, err = c.wishes(args{})
	}
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	list := func(name string, n int, text func(i int) string) {
		for i := range n {
			if i == 0 {
				b.WriteString(name + " ")
			}
			b.WriteString(text(i) + " ")
		}
	}
	list("ips", len(w.ips), func(i int) string { return w.ips[i].String() })
	if w.mac != (rtnl.MAC{}) {
		fmt.Fprintf(&b, "mac %s ", w.mac)
	}
	list("ports", len(w.ports), func(i int) string {
		p := w.ports[i]
		on := fmt.Sprint(p.HostPort)
		if p.HostIP.IsValid() {
			on = netip.AddrPortFrom(p.HostIP, p.HostPort).String()
		}
		return fmt.Sprintf("%s/%s→%d", on, p.Protocol, p.Port)
	})
	if w.toPod.Rate > 0 {
		fmt.Fprintf(&b, "to %d/%d ", w.toPod.Rate, w.toPod.Burst)
	}
	if w.fromPod.Rate > 0 {
		fmt.Fprintf(&b, "from %d/%d ", w.fromPod.Rate, w.fromPod.Burst)
	}
	list("ranges", len(c.ranges), func(i int) string { return c.ranges[i].String() })
	list("dns", len(w.dns.Nameservers), func(i int) string { return w.dns.Nameservers[i] })
	list("search", len(w.dns.Search), func(i int) string { return w.dns.Search[i] })
	list("options", len(w.dns.Options), func(i int) string { return w.dns.Options[i] })
	return b.String()
}

// Every capability at once, through libcni, and what CHECK and DEL make of it.
func TestCapabilities(t *testing.T) {
	l := newLab(t)
	needRoot(t, "tc", "nft")
	pod := l.newPod()
	r := rt("web", pod)
	r.CapabilityArgs = map[string]any{
		"ips": []string{"10.244.1.9"}, "mac": "0e:00:00:00:00:09",
		"portMappings":                      []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}, map[string]any{"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}},
		"bandwidth":                         map[string]any{"ingressRate": 8000000, "ingressBurst": 800000, "egressRate": 16000000, "egressBurst": 4294967295},
		"io.kubernetes.cri.pod-annotations": map[string]string{"meshd.dev/ips": "fd00:10:244:1::9"},
	}
	link := HostLink("web", "eth0")
	result := l.mustAdd(r)
	if got, want := addresses(result), "10.244.1.9/32 fd00:10:244:1::2/128"; got != want {
		t.Errorf("addresses %s, want %s", got, want)
	}
	for what, want := range map[string]string{
		run(t, "tc", "qdisc", "show", "dev", link):                             "tbf 1: root refcnt",
		run(t, "tc", "qdisc", "show", "dev", link) + " ":                       "rate 8Mbit burst 100000b",
		run(t, "nsenter", inPod(pod, "tc", "qdisc", "show", "dev", "eth0")...): "rate 16Mbit burst 200000b",
		run(t, "nft", "list", "map", "inet", "meshd", "hostport4"):             "0.0.0.0 . tcp . 8080 : 10.244.1.9 . 80",
		run(t, "nft", "list", "map", "inet", "meshd", "hostport4") + " ":       "127.0.0.1 . udp . 53 : 10.244.1.9 . 53",
		run(t, "nft", "list", "map", "inet", "meshd", "hostport6"):             ":: . tcp . 8080 : fd00:10:244:1::2 . 80",
		run(t, "nft", "list", "set", "inet", "meshd", "pod6"):                  link,
		run(t, "cat", "/proc/sys/net/ipv4/conf/"+link+"/route_localnet"):       "1",
	} {
		if !strings.Contains(what, want) {
			t.Errorf("%s\nlacks %s", what, want)
		}
	}
	if err := l.check(r); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	l.applyFirewall() // the daemon has nothing to change about it
	if err := l.check(r); err != nil {
		t.Errorf("CHECK after a round of the daemon: %v", err)
	}
	// A neighbour cannot have the port, and leaves nothing behind.
	other := rt("other", l.newPod())
	other.CapabilityArgs = map[string]any{"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 81, "protocol": "tcp"}}}
	_, err := l.add(other)
	wantCode(t, err, CodePortTaken, "host port is taken")
	if got := append(l.links(), l.records()...); len(got) != 2 {
		t.Errorf("after a port that was taken: %v", got)
	}
	if err := l.check(r); err != nil {
		t.Errorf("the refused one hurt the first: %v", err)
	}
	run(t, "nft", "flush", "map", "inet", "meshd", "hostport4")
	wantCode(t, l.check(r), CodeDrift, "element 0.0.0.0 . tcp . 8080 : 10.244.1.9 . 80 in set hostport4 of table inet meshd (firewall)")
	l.applyFirewall()
	if err := l.check(r); err != nil {
		t.Errorf("the daemon did not bring the host ports back: %v", err)
	}
	run(t, "tc", "qdisc", "del", "dev", link, "root")
	wantCode(t, l.check(r), CodeDrift, "qdisc tbf dev "+link+" rate 8000000bit (on the host)")
	l.mustDel(r)
	if got := l.elements(); len(got) != 0 {
		t.Errorf("after DEL in the firewall: %q", got)
	}
	l.mustAdd(other)
	removePod(pod)
	l.sweep(nil)
	l.mustDel(other)
	removePod(other.NetNS)
	l.sweep(nil)
	l.wantClean()
}

// The least rate that Kubernetes takes is one the kernel holds, and packets fit.
func TestTheLeastBandwidth(t *testing.T) {
	l := newLab(t)
	needRoot(t, "tc", "ping")
	r := rt("web", l.newPod())
	r.CapabilityArgs = map[string]any{"bandwidth": map[string]any{"ingressRate": 1000, "ingressBurst": 2147483647, "egressRate": 1000, "egressBurst": 2147483647}}
	l.mustAdd(r)
	if got := run(t, "tc", "qdisc", "show", "dev", HostLink("web", "eth0")); !strings.Contains(got, "rate 1Kbit") {
		t.Errorf("to the pod: %s", got)
	}
	if got := run(t, "nsenter", inPod(r.NetNS, "tc", "qdisc", "show", "dev", "eth0")...); !strings.Contains(got, "rate 1Kbit") {
		t.Errorf("from the pod: %s", got)
	}
	if err := l.check(r); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	neighbour := l.newPod()
	l.mustAdd(rt("neighbour", neighbour))
	run(t, "nsenter", inPod(neighbour, "ping", "-c", "1", "-s", "1392", "-W", "5", "10.244.1.2")...)
}

// Host ports as a client sees them; the daemon's part alone is in TestStory.
func TestHostPortsWork(t *testing.T) {
	l := newLab(t)
	needRoot(t, "bash")
	t.Setenv("LC_ALL", "C") // errors are compared
	run(t, "ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
	run(t, "ip", "addr", "add", "2001:db8::1/128", "dev", "lo", "nodad")
	run(t, "ip", "link", "add", mesh.Device, "type", "veth") // has the node's mesh addresses
	run(t, "ip", "addr", "add", "10.244.1.1/32", "dev", mesh.Device)
	run(t, "ip", "addr", "add", "fd00:10:244:1::1/128", "dev", mesh.Device, "nodad")
	run(t, "ip", "link", "set", mesh.Device, "up")
	pod, neighbour := l.newPod(), l.newPod()
	r := rt("web", pod)
	r.CapabilityArgs = map[string]any{"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
	l.mustAdd(r)
	l.mustAdd(rt("neighbour", neighbour))
	serve := exec.Command("nsenter", inPod(pod, os.Args[0], "-test.run=^TestHelperServes$")...)
	serve.Env = append(os.Environ(), "CNI_TEST_SERVE=:80")
	out, err := serve.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = serve.Process.Kill(); _ = serve.Wait() }()
	if _, err := out.Read(make([]byte, 10)); err != nil { // it says when it listens
		t.Fatal(err)
	}
	ask := func(netns, to string) error {
		args := []string{"bash", "-c", "exec 3<>/dev/tcp/" + strings.Replace(to, " ", "/", 1) + "; read -t 2 -u 3 x; echo $x"}
		if netns != "" {
			args = append([]string{"nsenter", "--net=" + netns}, args...)
		}
		got, err := exec.Command("timeout", append([]string{"3"}, args...)...).CombinedOutput()
		if err != nil || strings.TrimSpace(string(got)) != "hello" {
			return fmt.Errorf("%s %v", got, err)
		}
		return nil
	}
	for _, from := range []string{"", neighbour, pod} {
		for _, to := range []string{"192.0.2.1 8080", "2001:db8::1 8080"} {
			if err := ask(from, to); err != nil {
				t.Errorf("from %q to %s: %v", from, to, err)
			}
		}
	}
	if err := ask("", "127.0.0.1 8080"); err != nil {
		t.Errorf("by loopback: %v", err)
	}
	l.mustDel(r)
	if err := ask("", "192.0.2.1 8080"); err == nil || !strings.Contains(err.Error(), "Connection refused") {
		t.Errorf("after DEL the host port is not closed: %v", err)
	}
}

// A UDP host port forgets the flows that began at this machine before there was
// a pod, and leaves those alone that pods have with the same port elsewhere.
func TestAHostPortForgetsNoFlowOfOthers(t *testing.T) {
	l := newLab(t)
	needRoot(t, "bash")
	if _, err := os.Stat("/proc/thread-self/net/nf_conntrack"); err != nil {
		t.Skip("needs /proc/net/nf_conntrack")
	}
	for _, line := range []string{
		"addr add 192.0.2.1/32 dev lo", "addr add 192.0.2.2/32 dev lo", "-6 addr add 2001:db8::1/128 dev lo nodad",
		"link add outside type veth peer name beyond", "link set outside up", "link set beyond up",
		"route add 198.51.100.0/24 dev outside", "neigh add 198.51.100.9 lladdr 02:00:00:00:00:09 dev outside",
	} {
		run(t, "ip", strings.Fields(line)...)
	}
	neighbour := l.newPod()
	l.mustAdd(rt("neighbour", neighbour))
	run(t, "nsenter", inPod(neighbour, "bash", "-c", "for to in 198.51.100.9 192.0.2.1 192.0.2.2; do echo > /dev/udp/$to/443; done")...)
	run(t, "bash", "-c", "echo > /dev/udp/2001:db8::1/443; echo > /dev/udp/192.0.2.1/444")
	flows := func() (found []string) {
		text, err := os.ReadFile("/proc/thread-self/net/nf_conntrack")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			for _, to := range []string{"198.51.100.9 443", "192.0.2.1 443", "192.0.2.2 443", "2001:0db8:0000:0000:0000:0000:0000:0001 443", "192.0.2.1 444"} {
				addr, port, _ := strings.Cut(to, " ")
				original, _, _ := strings.Cut(line, "dport="+port+" ")
				if strings.Contains(line, "dport="+port+" ") && strings.Contains(original, "dst="+addr+" ") {
					found = append(found, to)
				}
			}
		}
		slices.Sort(found)
		return found
	}
	if got := flows(); len(got) != 5 {
		t.Fatalf("flows before: %q, want five", got)
	}
	mapped := func(id, hostIP string) {
		r := rt(id, l.newPod())
		r.CapabilityArgs = map[string]any{"portMappings": []any{map[string]any{"hostPort": 443, "containerPort": 443, "protocol": "udp", "hostIP": hostIP}}}
		l.mustAdd(r)
	}
	mapped("one", "192.0.2.2")
	if diff := cmp.Diff([]string{"192.0.2.1 443", "192.0.2.1 444", "198.51.100.9 443", "2001:0db8:0000:0000:0000:0000:0000:0001 443"}, flows()); diff != "" {
		t.Errorf("after a port of one address (-want +got):\n%s", diff)
	}
	mapped("all", "")
	if diff := cmp.Diff([]string{"192.0.2.1 444", "198.51.100.9 443"}, flows()); diff != "" {
		t.Errorf("after a port of all addresses (-want +got):\n%s", diff)
	}
}

// The firewall is not there, or not ours: no pod goes without it.
func TestNoPodWithoutItsFirewall(t *testing.T) {
	reason := filepath.Join(t.TempDir(), "reason")
	l := newLab(t, func(n *Network) { n.ReasonFile = reason })
	needRoot(t, "nft")
	before := rt("before", l.newPod())
	l.mustAdd(before)
	for _, mess := range []string{"flush chain inet meshd leaving", "flush chain inet meshd pod", "flush chain inet meshd antispoof",
		"flush table inet meshd", "delete table inet meshd", "add table inet meshd"} {
		if strings.HasPrefix(mess, "flush") {
			l.applyFirewall()
		}
		run(t, "nft", strings.Fields(mess)...)
		_, err := l.add(rt("web", l.newPod()))
		wantCode(t, err, types.ErrTryAgainLater, "is meshd running?")
		_, err = l.verb("STATUS", "", "", nil)
		wantCode(t, err, types.ErrPluginNotAvailable, "is meshd running?")
		if got := append(l.links(), l.records()...); len(got) != 2 {
			t.Errorf("an ADD without a firewall left something: %v", got)
		}
	}
	if err := os.WriteFile(reason, []byte("datapath/firewall: this kernel has no nf_tables\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := l.add(rt("web", l.newPod()))
	wantCode(t, err, types.ErrTryAgainLater, "Z: datapath/firewall: this kernel has no nf_tables")
	wantCode(t, l.check(before), CodeDrift, "in set pod4 of table inet meshd")
	l.applyFirewall()
	if err := l.check(before); err != nil {
		t.Errorf("the daemon did not bring the pod back: %v", err)
	}
	run(t, "nft", "delete", "table", "inet", "meshd")
	l.mustDel(before) // goes without a table as well
	l.applyFirewall()
	removePod(before.NetNS)
	l.sweep(nil)
	l.wantClean()
}

// Results for each version of the specification, byte for byte.
func TestResultsExactly(t *testing.T) {
	l := newLab(t, func(n *Network) { n.Table = "" })
	pod := l.newPod()
	link := HostLink("web", "eth0")
	for version, want := range map[string]string{
		"0.3.1": `{"cniVersion":"0.3.1","dns":{"nameservers":["192.0.2.53"]},"interfaces":[{"mac":"0a:6d:65:73:68:01","name":"LINK"},{"mac":"0e:00:00:00:00:09","name":"eth0","sandbox":"POD"}],` +
			`"ips":[{"address":"10.244.1.2/32","gateway":"169.254.1.1","interface":1,"version":"4"},{"address":"fd00:10:244:1::2/128","gateway":"fe80::1","interface":1,"version":"6"}],` +
			`"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}]}`,
		"1.0.0": `{"cniVersion":"1.0.0","dns":{"nameservers":["192.0.2.53"]},"interfaces":[{"mac":"0a:6d:65:73:68:01","name":"LINK"},{"mac":"0e:00:00:00:00:09","name":"eth0","sandbox":"POD"}],` +
			`"ips":[{"address":"10.244.1.2/32","gateway":"169.254.1.1","interface":1},{"address":"fd00:10:244:1::2/128","gateway":"fe80::1","interface":1}],` +
			`"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}]}`,
		"1.1.0": `{"cniVersion":"1.1.0","dns":{"nameservers":["192.0.2.53"]},"interfaces":[{"mac":"0a:6d:65:73:68:01","mtu":1420,"name":"LINK"},{"mac":"0e:00:00:00:00:09","mtu":1420,"name":"eth0","sandbox":"POD"}],` +
			`"ips":[{"address":"10.244.1.2/32","gateway":"169.254.1.1","interface":1},{"address":"fd00:10:244:1::2/128","gateway":"fe80::1","interface":1}],` +
			`"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}]}`,
	} {
		for _, v := range []string{version, map[string]string{"0.3.1": "0.4.0"}[version]} {
			if v == "" {
				continue
			}
			more := map[string]any{"quarantineSeconds": 0, "runtimeConfig": map[string]any{"mac": "0e:00:00:00:00:09", "dns": map[string]any{"servers": []string{"192.0.2.53"}}}}
			out, err := l.verbEnv(verbEnv("ADD", "web", pod), l.stdin(v, more))
			if err != nil {
				t.Fatalf("%s: %v", v, err)
			}
			want := strings.NewReplacer("LINK", link, "POD", pod, `"cniVersion":"0.3.1"`, `"cniVersion":"`+v+`"`).Replace(want)
			if diff := cmp.Diff(want, compact(t, out)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", v, diff)
			}
			if _, err := l.verb("DEL", "web", "", nil); err != nil {
				t.Fatal(err)
			}
			if err := deleteLinkNamed(t, link); err != nil {
				t.Fatal(err)
			}
			mustForget(t, l) // the same address again
		}
	}
}

func mustFreed(t *testing.T, l *lab) []string {
	t.Helper()
	s := openStore(l.dataDir, "meshd")
	files, _, _, err := s.freed()
	if err != nil {
		t.Fatal(err)
	}
	for i := range files {
		files[i] = s.path(freedDir) + "/" + files[i]
	}
	return files
}

// mustForget lets all addresses count as never used.
func mustForget(t *testing.T, l *lab) {
	t.Helper()
	if err := os.RemoveAll(openStore(l.dataDir, "meshd").path(freedDir)); err != nil {
		t.Fatal(err)
	}
}

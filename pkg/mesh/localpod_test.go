package mesh

import (
	"net/netip"
	"slices"
	"testing"
)

func TestElementsOfAPod(t *testing.T) {
	a := netip.MustParseAddr
	p := LocalPod{Link: "msh5d2c81f0a9e3", Addrs: []netip.Addr{a("10.244.1.5"), a("fd00::5")}, HostPorts: []HostPort{
		{Protocol: TCP, HostPort: 8080, Port: 80},
		{HostIP: a("0.0.0.0"), Protocol: UDP, HostPort: 53, Port: 5353},
		{HostIP: a("2001:db8::1"), Protocol: SCTP, HostPort: 9, Port: 9},
	}}
	var got []string
	for _, e := range p.Elements() {
		got = append(got, e.Set+" "+e.String())
	}
	want := []string{
		`pod4 "msh5d2c81f0a9e3" . 10.244.1.5`,
		`hostport4 0.0.0.0 . tcp . 8080 : 10.244.1.5 . 80`,
		`hostport4 0.0.0.0 . udp . 53 : 10.244.1.5 . 5353`,
		`hairpin4 10.244.1.5 . 10.244.1.5`,
		`pod6 "msh5d2c81f0a9e3" . fd00::5`,
		`hostport6 :: . tcp . 8080 : fd00::5 . 80`,
		`hostport6 2001:db8::1 . sctp . 9 : fd00::5 . 9`,
		`hairpin6 fd00::5 . fd00::5`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("elements %q\nwant %q", got, want)
	}
	if got := (SetElement{Set: "pod4", Key: "short"}).String(); got != "" {
		t.Errorf("half an element reads %q", got)
	}
}

package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"meshd.dev/pkg/cni"
	"meshd.dev/pkg/mesh"
)

var web = cni.Record{
	ContainerID: "3f2ae1c9d8b7a6f5", IfName: "eth0", HostLink: "msh5d2c81f0a9e3", Pod: cni.PodRef{Namespace: "prod", Name: "web-0"},
	Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("fd00:10:244:1::5")},
	HostPorts: []mesh.HostPort{{Protocol: mesh.TCP, HostPort: 8080, Port: 80}, {HostIP: netip.MustParseAddr("::1"), Protocol: mesh.UDP, HostPort: 53, Port: 5353}},
	Since:     time.Unix(1700000000, 0).UTC(),
}

func TestSweepIsPrintedWithReasons(t *testing.T) {
	old := web
	old.Pod = cni.PodRef{}
	for _, c := range []struct {
		dry    bool
		report cni.Report
		want   string
	}{
		{true, cni.Report{Kept: 3}, "nothing to give back; 3 attached\n"},
		{true, cni.Report{Freed: []cni.Freed{{Record: web, Why: "it is of another boot"}}, Links: []string{"mshaa"}, Unknown: []string{"mshbb"}, Kept: 1},
			"would give back 10.244.1.5 and fd00:10:244:1::5 of eth0 in container 3f2ae1c9d8b7, pod prod/web-0: it is of another boot\n" +
				"would give back link mshaa: no record knows it\n" +
				"left alone link mshbb: it has no record, and yet a pod behind it\n1 attached\n"},
		{false, cni.Report{Freed: []cni.Freed{{Record: old, Why: "host-local gave it back"}}, Corrupt: []string{"/x.corrupt"}},
			"gave back 10.244.1.5 and fd00:10:244:1::5 of eth0 in container 3f2ae1c9d8b7: host-local gave it back\n" +
				"set aside /x.corrupt: cannot be read; its addresses stay taken until its pod is gone\n0 attached\n"},
	} {
		var out strings.Builder
		printSweep(&out, c.report, c.dry)
		if diff := cmp.Diff(c.want, out.String()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
}

func TestPodColumns(t *testing.T) {
	want := []string{"10.244.1.5,fd00:10:244:1::5", "prod/web-0", "eth0", "msh5d2c81f0a9e3", "8080/tcp→80,[::1]:53/udp→5353", "3f2ae1c9d8b7", "2023-11-14T22:13:20Z"}
	if diff := cmp.Diff(want, podColumns(web)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

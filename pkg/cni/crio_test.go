package cni

import (
	"path/filepath"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/cri-o/ocicni/pkg/ocicni"
)

// CRI-O calls plugins through a library of its own: the same calls in its
// words, with what it makes of host ports, limits and annotations.
func TestAsCRIO(t *testing.T) {
	l := newLab(t)
	conf := t.TempDir()
	if _, err := WriteConflist(filepath.Join(conf, "10-meshd.conflist"), l.network); err != nil {
		t.Fatal(err)
	}
	crio, err := ocicni.InitCNINoInotify("", conf, t.TempDir(), l.binDir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := crio.Shutdown(); err != nil {
			t.Error(err)
		}
	}()
	if err := crio.Status(); err != nil {
		t.Fatalf("STATUS: %v", err)
	}
	pod := func(name string) ocicni.PodNetwork {
		annotations := map[string]string{"meshd.dev/ips": "10.244.1.42"}
		return ocicni.PodNetwork{Name: name, Namespace: "prod", ID: "id-" + name, UID: "uid-" + name, NetNS: l.newPod(),
			RuntimeConfig: map[string]ocicni.RuntimeConfig{"meshd": {
				PortMappings:   []ocicni.PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}},
				Bandwidth:      &ocicni.BandwidthConfig{IngressRate: 8000000, IngressBurst: 1<<32 - 1},
				CgroupPath:     "/kubelet.slice",
				PodAnnotations: &annotations,
			}}}
	}
	web := pod("web")
	results, err := crio.SetUpPod(web)
	if err != nil || len(results) != 1 {
		t.Fatalf("ADD: %v, %v", results, err)
	}
	result, err := types100.NewResultFromResult(results[0].Result)
	if err != nil || addresses(result) != "10.244.1.42/32 fd00:10:244:1::2/128" {
		t.Errorf("result %+v, %v", result, err)
	}
	if records, err := Pods(l.dataDir); err != nil || len(records) != 1 || records[0].Pod != (PodRef{"prod", "web", "uid-web"}) || len(records[0].HostPorts) != 1 || records[0].ToPod.Rate != 1000000 {
		t.Errorf("records %+v, %v", records, err)
	}
	if _, err := crio.GetPodNetworkStatus(web); err != nil { // CHECK, and a look at the addresses
		t.Errorf("CHECK: %v", err)
	}
	if _, err := crio.SetUpPod(pod("other")); err == nil || !strings.Contains(err.Error(), "10.244.1.42 belongs to eth0 of container id-web") {
		t.Errorf("a second pod with that address: %v", err)
	}
	if err := crio.GC(t.Context(), []*ocicni.PodNetwork{&web}); err != nil {
		t.Errorf("GC: %v", err)
	}
	if _, err := crio.GetPodNetworkStatus(web); err != nil {
		t.Errorf("GC hurt a valid pod: %v", err)
	}
	for range 2 {
		if err := crio.TearDownPod(web); err != nil {
			t.Errorf("DEL: %v", err)
		}
	}
	removePod(web.NetNS)
	if err := crio.GC(t.Context(), nil); err != nil {
		t.Errorf("GC of all: %v", err)
	}
	l.wantClean()
}

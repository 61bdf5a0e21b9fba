package node

import (
	"errors"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestReadiness(t *testing.T) {
	good, bad := &cri.RuntimeCondition{Type: "RuntimeReady", Status: true}, &cri.RuntimeCondition{Type: "RuntimeReady", Reason: "x"}
	net, noNet := &cri.RuntimeCondition{Type: "NetworkReady", Status: true}, &cri.RuntimeCondition{Type: "NetworkReady", Reason: "NetworkPluginNotReady", Message: "no conflist"}
	for _, c := range []struct {
		name string
		list []*cri.RuntimeCondition
		err  error
		want string
	}{
		{"well", []*cri.RuntimeCondition{good, net}, nil, "Ready=True NetworkUnavailable=False"},
		{"no network", []*cri.RuntimeCondition{good, noNet}, nil, "Ready=False NetworkUnavailable=True"},
		{"not ready", []*cri.RuntimeCondition{bad, net}, nil, "Ready=False NetworkUnavailable=False"},
		{"away", nil, errors.New("gone"), "Ready=False"},
	} {
		var got []string
		for _, k := range readiness(c.list, c.err) {
			got = append(got, string(k.Type)+"="+string(k.Status))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: got %v, want %s", c.name, got, c.want)
		}
	}
}

func TestAddressesAreReplacedWhole(t *testing.T) {
	got, err := replaceAddresses([]byte(`{"status":{"addresses":[],"$setElementOrder/addresses":[]}}`), []v1.NodeAddress{
		{Type: v1.NodeInternalIP, Address: "192.0.2.1"}, {Type: v1.NodeInternalIP, Address: "2001:db8::1"}})
	want := `{"status":{"addresses":[{"$patch":"replace"},{"type":"InternalIP","address":"192.0.2.1"},{"type":"InternalIP","address":"2001:db8::1"}]}}`
	if err != nil || string(got) != want {
		t.Errorf("got %s, %v", got, err)
	}
}

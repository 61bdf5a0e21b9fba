package trial

import (
	"os"
	"testing"

	"meshd.dev/pkg/datapath/wireguard/userspace/link"
)

// A kernel of today gets everything right. What is not found to work here
// would be lost speed, and the reason is worth knowing.
func TestThisKernel(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	o, err := Run()
	if want := (Offloads{Link: link.TCP | link.UDP, Sockets: true}); o != want || err != nil {
		t.Errorf("found %+v, want %+v; %v", o, want, err)
	}
}

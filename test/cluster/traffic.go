package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"meshd.dev/test/netlab"
)

// OnlyTunnels says what a capture saw that it must not have: anything but the
// tunnels and the kinds of packets named besides.
func OnlyTunnels(seen netlab.Traffic, beside ...string) error {
	var errs error
	if seen.Packets["wireguard"] == 0 {
		errs = errors.Join(errs, errors.New("no WireGuard packet on the underlay"))
	}
	if seen.Marked > 0 {
		errs = errors.Join(errs, fmt.Errorf("%d packets hold the payload in clear: %s", seen.Marked, strings.Join(seen.MarkedKinds, ", ")))
	}
	if seen.Inner > 0 {
		errs = errors.Join(errs, fmt.Errorf("%d packets show pod or service addresses: %s", seen.Inner, strings.Join(seen.InnerKinds, ", ")))
	}
	if seen.Dropped > 0 {
		errs = errors.Join(errs, fmt.Errorf("the capture missed %d packets", seen.Dropped))
	}
	for _, kind := range seen.Kinds() {
		if kind != "wireguard" && !slices.Contains(beside, kind) {
			errs = errors.Join(errs, fmt.Errorf("%d packets of kind %s on the underlay", seen.Packets[kind], kind))
		}
	}
	return errs
}

package cni

import "net/netip"

// forgetConnections is best effort: a connection of the last pod with an
// address must not be taken for one of the next.
func forgetConnections([]netip.Addr) {}

package datapath

import (
	"net/netip"

	"meshd.dev/pkg/datapath/route"
)

// LayFloor adds the blackholes by which nothing for the ranges leaves this
// machine in clear before a Datapath runs, and says what it did. A Datapath
// that runs loses nothing by it and takes away what it does not want.
func LayFloor(ranges []netip.Prefix) (did []string, err error) {
	return route.LayFloor(outermost(ranges))
}

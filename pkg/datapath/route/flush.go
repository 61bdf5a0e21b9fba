package route

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// ours are all routes of our protocol, in whatever table.
func ours() ([]netlink.Route, error) {
	var all []netlink.Route
	filter := &netlink.Route{Protocol: mesh.RouteProtocol, Table: unix.RT_TABLE_UNSPEC}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		all = append(all, routes...)
	}
	return all, nil
}

// Count is the number of routes of ours.
func Count() (int, error) {
	routes, err := ours()
	return len(routes), err
}

// Flush removes all routes of ours.
func Flush() error {
	routes, err := ours()
	errs := []error{err}
	for _, r := range routes {
		errs = append(errs, gone(netlink.RouteDel(&r)))
	}
	return errors.Join(errs...)
}

package dns

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/upstream"
)

func init() { plugin.Register(Name, setup) }

func setup(c *caddy.Controller) error {
	m, err := parse(c)
	if err != nil {
		return plugin.Error(Name, err)
	}
	dnsserver.GetConfig(c).AddPlugin(func(next plugin.Handler) plugin.Handler {
		m.Next = next
		return m
	})
	return nil
}

// parse reads one
//
//	mesh [ZONES...] {
//	    ttl SECONDS
//	    pods insecure|disabled
//	    fallthrough [ZONES...]
//	    index NAME
//	}
func parse(c *caddy.Controller) (*Mesh, error) {
	m := &Mesh{TTL: DefaultTTL, Upstream: upstream.New()}
	name := DefaultIndex
	for i := 0; c.Next(); i++ {
		if i > 0 {
			return nil, plugin.ErrOnce
		}
		m.Zones = plugin.OriginsFromArgsOrServerBlock(c.RemainingArgs(), c.ServerBlockKeys)
		for c.NextBlock() {
			if err := m.property(c, &name); err != nil {
				return nil, err
			}
		}
	}
	x, err := sharedIndex(name)
	if err != nil {
		return nil, err
	}
	m.Index = x
	return m, m.checkZones()
}

func (m *Mesh) property(c *caddy.Controller, name *string) error {
	switch property := c.Val(); property {
	case "fallthrough":
		m.Fall.SetZonesFromArgs(c.RemainingArgs())
		return nil
	case "ttl", "pods", "index":
		args := c.RemainingArgs()
		if len(args) != 1 {
			return c.ArgErr()
		}
		return m.set(c, property, args[0], name)
	default:
		return c.Errf("unknown property %q: want ttl, pods, fallthrough or index", property)
	}
}

func (m *Mesh) set(c *caddy.Controller, property, value string, name *string) error {
	switch property {
	case "ttl":
		ttl, err := strconv.ParseUint(value, 10, 32)
		if err != nil || ttl > 3600 {
			return c.Errf("ttl %q: want seconds from 0 to 3600", value)
		}
		m.TTL = uint32(ttl)
	case "pods":
		if value != "insecure" && value != "disabled" {
			return c.Errf("pods %q: want insecure or disabled", value)
		}
		m.NoPods = value == "disabled"
	case "index":
		*name = value
	}
	return nil
}

// checkZones refuses zones the index has no records for, which would
// otherwise look like a cluster without services.
func (m *Mesh) checkZones() error {
	for _, zone := range m.Zones {
		if zone != m.Index.Zone() && zone != "." && !strings.HasSuffix(zone, ".arpa.") {
			return fmt.Errorf("zone %s: the index holds %s and the reverse zones", zone, m.Index.Zone())
		}
	}
	return nil
}

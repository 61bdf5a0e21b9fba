package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// Multicast groups of rtnetlink and nfnetlink we listen to (their numbers,
// not their bits).
var (
	routeGroups = []uint32{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE}
	nftGroups   = []uint32{unix.NFNLGRP_NFTABLES}
)

// podGroups tell of what leads to pods.
var podGroups = []uint32{unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE}

// watchPods kicks when something that leads to a pod went. Mostly the pod did.
func watchPods(ctx context.Context, kick func(), log *slog.Logger) error {
	if kick == nil {
		return nil
	}
	return listen(ctx, unix.NETLINK_ROUTE, podGroups, takesFromPods, kick, log)
}

// takesFromPods reports whether an rtnetlink event may cut a pod off. Of a link
// that goes nothing is left to be mended.
func takesFromPods(m netlink.Message) bool {
	switch m.Header.Type {
	case unix.RTM_DELROUTE:
		return len(m.Data) >= unix.SizeofRtMsg && m.Data[5] == mesh.PodRouteProtocol
	case unix.RTM_DELNEIGH: // struct ndmsg: the state is its third word
		return len(m.Data) >= unix.SizeofNdMsg && binary.NativeEndian.Uint16(m.Data[8:])&unix.NUD_PERMANENT != 0
	case unix.RTM_NEWLINK: // struct ifinfomsg
		return len(m.Data) >= unix.SizeofIfInfomsg && binary.NativeEndian.Uint32(m.Data[8:])&unix.IFF_UP == 0 &&
			strings.HasPrefix(linkName(m), mesh.PodLinkPrefix)
	}
	return false
}

// watch kicks when somebody else changed links, addresses, routes or rules that
// may concern us. What we ourselves did to routes and rules, and the kernel
// told so, is no news.
func (d *Datapath) watch(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return listen(ctx, unix.NETLINK_ROUTE, routeGroups, func(m netlink.Message) bool {
			return concerns(m) && !d.routes.Echo(m.Header.PID)
		}, d.kickAll, d.cfg.Log)
	})
	group.Go(func() error { d.watchRules(ctx); return nil })
	return group.Wait()
}

// watchRules goes on where the kernel does not tell, as one without nf_tables:
// rounds look for themselves, and say what is missing.
func (d *Datapath) watchRules(ctx context.Context) {
	for told := false; ; told = true {
		err := listen(ctx, unix.NETLINK_NETFILTER, nftGroups, func(m netlink.Message) bool {
			return changesRules(m) && !d.firewall.Echo(m.Header.PID)
		}, d.Kick, d.cfg.Log)
		if ctx.Err() != nil {
			return
		}
		if !told {
			d.cfg.Log.Warn("changes of rules by others are found with the next round only", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(resync):
		}
	}
}

// eventBuffer takes the events of what is done in one go to the routes of a
// thousand nodes; those that do not fit are lost, and cost a whole round.
const eventBuffer = 8 << 20

// listen kicks for every message that matters until ctx ends. When messages
// were lost it kicks as well: something happened.
func listen(ctx context.Context, family int, groups []uint32, matters func(netlink.Message) bool, kick func(), log *slog.Logger) error {
	conn, err := netlink.Dial(family, nil)
	if err != nil {
		return fmt.Errorf("watch netlink: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	if err := conn.SetReadBuffer(eventBuffer); err != nil {
		log.Debug("netlink events", "err", err)
	}
	for _, g := range groups {
		if err := conn.JoinGroup(g); err != nil {
			return fmt.Errorf("watch netlink group %d: %w", g, err)
		}
	}
	for {
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			log.Debug("netlink events were lost", "family", family)
			kick()
			continue
		case err != nil:
			return fmt.Errorf("watch netlink: %w", err)
		}
		for _, m := range msgs {
			if matters(m) {
				kick()
				break
			}
		}
	}
}

// concerns reports whether an rtnetlink event may change our wish or undo it.
// Pods come and go without us: their links and host routes are the plugin's.
func concerns(m netlink.Message) bool {
	switch m.Header.Type {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(m.Data) < unix.SizeofRtMsg {
			return false
		}
		protocol := m.Data[5]
		return protocol != mesh.PodRouteProtocol && protocol != unix.RTPROT_KERNEL
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return !strings.HasPrefix(linkName(m), mesh.PodLinkPrefix)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return true
	}
	return false
}

// changesRules reports whether an nftables event may undo our wish. Not the
// mark that ends each transaction: whatever was changed in it has an event of
// its own. Nor a pod that the plugin admits: that is as it has to be, and
// looking at everything while a pod starts would only slow its start. One that
// is admitted without a record is found with the next round.
func changesRules(m netlink.Message) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
		return true
	}
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWGEN:
		return false
	case unix.NFT_MSG_NEWSETELEM:
		return !slices.Contains(podSets, setName(m))
	}
	return true
}

// podSets are those the plugin writes into.
var podSets = func() (all []string) {
	for _, set := range []string{mesh.PodSet, mesh.HostPortMap, mesh.HairpinSet} {
		all = append(all, set+"4", set+"6")
	}
	return all
}()

// setName is the set an event is about, if it is one of ours.
func setName(m netlink.Message) string {
	const nfgenmsg = 4
	if len(m.Data) < nfgenmsg {
		return ""
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[nfgenmsg:])
	if err != nil {
		return ""
	}
	var table, set string
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_SET_ELEM_LIST_TABLE:
			table = ad.String()
		case unix.NFTA_SET_ELEM_LIST_SET:
			set = ad.String()
		}
	}
	if table != mesh.FirewallTable {
		return ""
	}
	return set
}

func linkName(m netlink.Message) string {
	if len(m.Data) < unix.SizeofIfInfomsg {
		return ""
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofIfInfomsg:])
	if err != nil {
		return ""
	}
	ad.ByteOrder = binary.NativeEndian
	for ad.Next() {
		if ad.Type() == unix.IFLA_IFNAME {
			return ad.String()
		}
	}
	return ""
}

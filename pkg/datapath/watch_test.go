package datapath

import (
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

func TestWhichRulesMatter(t *testing.T) {
	event := func(kind uint16, table, set string) netlink.Message {
		b, err := netlink.MarshalAttributes([]netlink.Attribute{
			{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(table + "\x00")}, {Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(set + "\x00")}})
		if err != nil {
			t.Fatal(err)
		}
		return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind)}, Data: append([]byte{unix.NFPROTO_INET, 0, 0, 0}, b...)}
	}
	for _, c := range []struct {
		name string
		m    netlink.Message
		want bool
	}{
		{"a pod is admitted", event(unix.NFT_MSG_NEWSETELEM, "meshd", "pod6"), false},
		{"a host port is opened", event(unix.NFT_MSG_NEWSETELEM, "meshd", "hostport4"), false},
		{"somebody takes a pod out", event(unix.NFT_MSG_DELSETELEM, "meshd", "pod4"), true},
		{"a service changes", event(unix.NFT_MSG_NEWSETELEM, "meshd", "svc4"), true},
		{"a table of others", event(unix.NFT_MSG_NEWSETELEM, "theirs", "pod4"), true},
		{"a rule", event(unix.NFT_MSG_NEWRULE, "meshd", "forward"), true},
		{"the table goes", event(unix.NFT_MSG_DELTABLE, "meshd", ""), true},
		{"a transaction ends", event(unix.NFT_MSG_NEWGEN, "", ""), false},
		{"too short", netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWSETELEM)}}, true},
	} {
		if got := changesRules(c.m); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

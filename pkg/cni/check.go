package cni

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"meshd.dev/pkg/cni/rtnl"
)

// check compares what ADD made with what is there.
func check(c *conf, cmd *call) error {
	if err := c.complete(); err != nil {
		return err
	}
	s := c.store()
	n, ok, err := s.find(cmd.containerID, cmd.ifName)
	if err != nil {
		return err
	}
	if !ok {
		return types.NewError(types.ErrUnknownContainer, "no record of the attachment",
			fmt.Sprintf("%s of container %s in %s", cmd.ifName, cmd.containerID, s.dir))
	}
	text, err := os.ReadFile(s.path(n.String()))
	if err != nil {
		return fmt.Errorf("read record: %w", err)
	}
	r, err := decodeRecord(n, text)
	if err != nil {
		return types.NewError(CodeDrift, "record is corrupt: DEL and ADD the pod", err.Error())
	}
	if r.HostLocal != "" {
		return types.NewError(CodeDrift, "attachment was made by another plugin: DEL and ADD the pod", r.HostLocal)
	}
	ns, err := openNetns(cmd.netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	host, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	a := r.attachment(c.MTU)
	missing := a.adopt(c.prevResult, cmd.ifName, cmd.netns)
	found, err := drift(host, ns, a)
	if err != nil {
		return err
	}
	notAdmitted, err := r.notAdmitted()
	if err != nil {
		return err
	}
	if missing = slices.Concat(missing, found, notAdmitted); len(missing) > 0 {
		return types.NewError(CodeDrift, "attachment is not as ADD made it", "missing: "+strings.Join(missing, "; "))
	}
	return nil
}

// adopt takes over what plugins after this one may change (the specification's
// prevResult is the chain's last word): MAC, MTU and whether the default
// routes are ours. It returns what the record has and prevResult does not.
func (a *attachment) adopt(prev *types100.Result, ifName, sandbox string) (missing []string) {
	if prev == nil {
		return nil
	}
	pod := slices.IndexFunc(prev.Interfaces, func(i *types100.Interface) bool { return i.Name == ifName && i.Sandbox == sandbox })
	if pod < 0 {
		return []string{"interface " + ifName + " in prevResult"}
	}
	if mac, err := parseMAC(prev.Interfaces[pod].Mac); err == nil {
		a.podMAC = mac
	}
	if mtu := prev.Interfaces[pod].Mtu; mtu != 0 {
		a.mtu = mtu
	}
	for _, addr := range a.addresses {
		gw, all := gateway(addr)
		has := slices.ContainsFunc(prev.IPs, func(ip *types100.IPConfig) bool { return ip.Address.IP.Equal(addr.AsSlice()) })
		if !has {
			missing = append(missing, "address "+addr.String()+" in prevResult")
		}
		ours := slices.ContainsFunc(prev.Routes, func(r *types.Route) bool {
			ones, _ := r.Dst.Mask.Size()
			return ones == 0 && r.GW.Equal(gw.AsSlice())
		})
		if ours {
			a.defaults = append(a.defaults, all)
		}
	}
	return missing
}

// drift lists what a wants and the kernel has not.
func drift(host *rtnl.Conn, ns *netns, a attachment) ([]string, error) {
	haveHost, err := facts(host, a.hostLink, a.hostFactSysctls())
	if err != nil {
		return nil, err
	}
	var havePod []fact
	err = ns.visit(func() error {
		pod, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer pod.Close()
		if havePod, err = facts(pod, a.podLink, a.podSysctls()); err != nil {
			return err
		}
		lo, err := pod.Link("lo")
		havePod = append(havePod, upFact("lo", lo.Up))
		return ignoreGone(err)
	})
	if err != nil {
		return nil, err
	}
	wantHost, wantPod := a.wanted()
	return append(lacking(wantHost, haveHost, "on the host"), lacking(wantPod, havePod, "in the pod")...), nil
}

package cni

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"meshd.dev/pkg/cni/rtnl"
)

// add attaches a pod.
func add(c *conf, cmd *call) error {
	if err := c.complete(); err != nil {
		return err
	}
	q, w, err := c.request(cmd)
	if err != nil {
		return err
	}
	ns, err := openNetns(cmd.netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	q.record.NetnsDevice, q.record.NetnsInode = ns.device, ns.inode
	host, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer host.Close()

	s := c.store()
	h, r, reused, err := s.reserve(q)
	if errors.Is(err, errExists) {
		if err := takeOver(host, h, c, ns); err != nil {
			return err
		}
		h, r, reused, err = s.reserve(q)
	}
	if err != nil {
		return err
	}
	defer h.release()
	saved := h.save()
	// While the disk works, what changes nothing: it costs no time then.
	a := r.attachment(c.MTU)
	pod, err := ns.open()
	if err == nil {
		defer pod.Close()
	}
	var result bytes.Buffer
	look := func() error {
		if a.defaults, err = missingDefaults(pod, a.addresses); err != nil {
			return err
		}
		result.Reset()
		return a.result(c, w.dns, cmd.netns, &result)
	}
	if err == nil {
		err = look()
	}
	if err := errors.Join(saved(), err); err != nil {
		return errors.Join(err, h.discard())
	}
	if reused {
		forgetConnections(r.Addresses)
	}
	done := false
	defer func() {
		if !done && erase(host, r) == nil {
			_ = h.discard() // else the record stays, for DEL
		}
	}()
	if err := s.attach(&a, site{host, pod, ns}, look, r.admit); err != nil {
		return c.explained(fmt.Errorf("attach %s to container %s: %w", r.IfName, r.ContainerID, err))
	}
	if _, err := os.Stdout.Write(result.Bytes()); err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	done = true
	return nil
}

// forgetConnections of pods that had the addresses before: best effort, it is
// about what they left open.
func forgetConnections(addrs []netip.Addr) {
	nf, err := rtnl.OpenNetfilter()
	if err != nil {
		return
	}
	defer nf.Close()
	_ = nf.ForgetConnections(addrs)
}

// request is what the store needs for an ADD.
func (c *conf) request(cmd *call) (q request, w wishes, err error) {
	if len(cmd.containerID) > maxContainerID || strings.HasSuffix(cmd.containerID, corruptSuffix) {
		return q, w, types.NewError(types.ErrInvalidEnvironmentVariables, "invalid CNI_CONTAINERID",
			fmt.Sprintf("%.80q: want at most %d bytes, not ending in %s", cmd.containerID, maxContainerID, corruptSuffix))
	}
	a, err := parseArgs(cmd.args)
	if err != nil {
		return q, w, err
	}
	if w, err = c.wishes(a); err != nil {
		return q, w, err
	}
	if w.mac == (rtnl.MAC{}) {
		w.mac = podMAC(cmd.containerID, cmd.ifName)
	}
	ranges := c.ranges
	if !ipv6Exists() {
		ranges = slices.DeleteFunc(slices.Clone(ranges), func(r span) bool { return r.prefix.Addr().Is6() })
		if len(ranges) == 0 {
			return q, w, invalid("ranges", "only IPv6 ones, and this kernel has IPv6 switched off")
		}
	}
	bootID, err := readBootID()
	if err != nil {
		return q, w, err
	}
	return request{
		ranges: ranges, reserved: c.reserved, requested: w.ips, noted: w.noted, quarantine: c.quarantine,
		record: Record{
			ContainerID: cmd.containerID, IfName: cmd.ifName, Netns: cmd.netns, BootID: bootID, Pod: a.pod,
			HostLink: HostLink(cmd.containerID, cmd.ifName), MAC: w.mac.String(),
			Table: c.Table, HostPorts: w.ports, ToPod: w.toPod, FromPod: w.fromPod,
		},
	}, w, nil
}

// attach makes the kernel hold a. What an earlier DEL left to die with its
// namespace may still be in the way, on the host or in the pod; when that is
// gone, look is called again.
func (s store) attach(a *attachment, at site, look, admit func() error) error {
	for range maxTries {
		err := a.attach(at, admit)
		if !errors.Is(err, errNameTaken) {
			return err
		}
		link, lookErr := a.inTheWay(at)
		if lookErr != nil {
			return lookErr
		}
		owned, lookErr := s.owned(link, a.hostLink)
		if lookErr != nil {
			return lookErr
		}
		if link == "" || owned {
			return types.NewError(CodeAttached, "interface exists already in the container: DEL first, or use another name", err.Error())
		}
		if err := deleteLink(at.host, link); err != nil {
			return err
		}
		if err := look(); err != nil {
			return err
		}
	}
	return errBusy
}

// inTheWay names our link whose presence keeps a from being made, or none.
func (a *attachment) inTheWay(at site) (string, error) {
	if _, err := at.host.Link(a.hostLink); !isGone(err) {
		return a.hostLink, err
	}
	inPod, err := at.pod.Link(a.podLink)
	if isGone(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	links, err := ourLinks(at.host)
	for _, l := range links {
		if l.Index == inPod.Peer && l.Peer == inPod.Index {
			return l.Name, nil
		}
	}
	return "", err
}

// owned says whether a link belongs to another recorded attachment than the one
// whose link is to be called mine (reserve saw that nobody else has that name).
func (s store) owned(link, mine string) (bool, error) {
	if link == mine {
		return false, nil
	}
	names, _, err := s.names()
	return slices.ContainsFunc(names, func(n recordName) bool { return HostLink(n.containerID, n.ifName) == link }), err
}

// takeOver deals with a record that is there already when ADD comes. If all of
// it stands the specification wants an error. Else an ADD died on the way, and
// what it left goes.
func takeOver(host *rtnl.Conn, h *held, c *conf, ns *netns) error {
	defer h.release()
	r, err := h.read()
	if errors.Is(err, errCorrupt) {
		return types.NewError(CodeAttached, "attachment has a corrupt record: DEL first", err.Error())
	}
	if err != nil {
		return err
	}
	if r.HostLocal != "" {
		return types.NewError(CodeAttached, "attachment was made by another plugin: DEL first", r.HostLocal)
	}
	if r.NetnsDevice == ns.device && r.NetnsInode == ns.inode {
		missing, err := drift(host, ns, r.attachment(c.MTU))
		if err != nil {
			return err
		}
		if len(missing) == 0 {
			return types.NewError(CodeAttached, "attachment exists already: DEL first",
				fmt.Sprintf("%s of container %s has %v since %s", r.IfName, r.ContainerID, r.Addresses, r.Since))
		}
	}
	if err := erase(host, r); err != nil {
		return err
	}
	return h.discard()
}

// result writes what ADD prints, in the version that was asked for.
func (a attachment) result(c *conf, dns types.DNS, sandbox string, to io.Writer) error {
	r, err := a.newResult(c, dns, sandbox).GetAsVersion(c.CNIVersion)
	if err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	return r.PrintTo(to)
}

// newResult is what ADD made, behind what a plugin before it in the chain made.
func (a attachment) newResult(c *conf, dns types.DNS, sandbox string) *types100.Result {
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	if c.prevResult != nil {
		*r = *c.prevResult
		r.CNIVersion = types100.ImplementedSpecVersion
	}
	mtu := 0
	if c.CNIVersion == types100.ImplementedSpecVersion {
		mtu = a.mtu // a field of 1.1.0
	}
	pod := len(r.Interfaces) + 1
	r.Interfaces = append(slices.Clone(r.Interfaces),
		&types100.Interface{Name: a.hostLink, Mac: hostMAC.String(), Mtu: mtu},
		&types100.Interface{Name: a.podLink, Mac: a.podMAC.String(), Mtu: mtu, Sandbox: sandbox})
	for _, addr := range a.addresses {
		gw, all := gateway(addr)
		r.IPs = append(r.IPs, &types100.IPConfig{Interface: &pod, Address: ipNet(hostPrefix(addr)), Gateway: gw.AsSlice()})
		if slices.Contains(a.defaults, all) {
			r.Routes = append(r.Routes, &types.Route{Dst: ipNet(all), GW: gw.AsSlice()})
		}
	}
	if !dns.IsEmpty() {
		r.DNS = dns
	}
	return r
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni/rtnl"
)

// Main runs the plugin once, as the environment and standard input say, and
// gives the exit code. about is printed when there is no CNI_COMMAND.
func Main(about string) int {
	// One thread: it visits namespaces, and a test counts its system calls.
	runtime.LockOSThread()
	p := &plugin{version: types100.ImplementedSpecVersion}
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: p.verb(p.add), Del: p.verb(p.del), Check: p.verb(p.check), GC: p.verb(p.gc), Status: p.verb(p.status),
	}, version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0"), about)
	if err == nil {
		return 0
	}
	text, _ := json.MarshalIndent(struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{p.version, err}, "", "    ")
	_, _ = os.Stdout.Write(append(text, '\n'))
	return 1
}

type plugin struct {
	// version of the specification in use, for errors.
	version string
}

// verb reads the configuration before f and gives errors a code after it.
func (p *plugin) verb(f func(*conf, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(cmd *skel.CmdArgs) error {
		c, err := parseConf(cmd.StdinData)
		if err != nil {
			return err
		}
		if c.CNIVersion != "" {
			p.version = c.CNIVersion
		}
		return coded(f(c, cmd))
	}
}

// coded gives an error without a code the one that fits: what went wrong with
// files is code 5, everything else 999.
func coded(err error) error {
	var have *types.Error
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case err == nil || errors.As(err, &have):
		return err
	case errors.Is(err, errBusy):
		return types.NewError(types.ErrTryAgainLater, "attachment is busy", err.Error())
	case errors.As(err, &path), errors.As(err, &link), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EIO):
		return types.NewError(types.ErrIOFailure, "I/O failure", err.Error())
	}
	return types.NewError(types.ErrInternal, "cannot do it", err.Error())
}

func isGone(err error) bool { return errors.Is(err, unix.ENODEV) }

func ignoreGone(err error) error {
	if isGone(err) {
		return nil
	}
	return err
}

// add attaches a pod.
func (p *plugin) add(c *conf, cmd *skel.CmdArgs) error {
	if err := c.complete(); err != nil {
		return err
	}
	if len(cmd.ContainerID) > maxContainerID || strings.HasSuffix(cmd.ContainerID, corruptSuffix) {
		return types.NewError(types.ErrInvalidEnvironmentVariables, "invalid CNI_CONTAINERID",
			fmt.Sprintf("%.80q: want at most %d bytes, not ending in %s", cmd.ContainerID, maxContainerID, corruptSuffix))
	}
	q, mac, err := c.request(cmd)
	if err != nil {
		return err
	}
	ns, err := openNetns(cmd.Netns)
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

	s := openStore(c.DataDir, c.Name)
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
	done := false
	defer func() {
		if !done && deleteLink(host, r.HostLink) == nil {
			_ = h.discard() // else the record stays, for DEL
		}
	}()
	a := attachment{
		hostLink: r.HostLink, podLink: r.IfName, podMAC: mac, mtu: c.MTU, addresses: r.Addresses, alias: r.alias(),
	}
	if reused {
		// Best effort: it is about connections the last pod left open.
		_ = rtnl.ForgetConnections(r.Addresses)
	}
	if err := s.attach(&a, host, ns); err != nil {
		return fmt.Errorf("attach %s to container %s: %w", r.IfName, r.ContainerID, err)
	}
	if err := types.PrintResult(a.result(c, cmd.Netns), c.CNIVersion); err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	done = true
	return nil
}

// request is what the store needs for an ADD.
func (c *conf) request(cmd *skel.CmdArgs) (q request, mac rtnl.MAC, err error) {
	a, err := parseArgs(cmd.Args)
	if err != nil {
		return q, mac, err
	}
	ips, mac, err := c.wishes(a)
	if err != nil {
		return q, mac, err
	}
	if mac == (rtnl.MAC{}) {
		mac = podMAC(cmd.ContainerID, cmd.IfName)
	}
	ranges := c.ranges
	if !ipv6Exists() {
		ranges = slices.DeleteFunc(slices.Clone(ranges), func(r netip.Prefix) bool { return r.Addr().Is6() })
		if len(ranges) == 0 {
			return q, mac, invalid("ranges", "only IPv6 ones, and this kernel has IPv6 switched off")
		}
	}
	bootID, err := readBootID()
	if err != nil {
		return q, mac, err
	}
	return request{
		ranges: ranges, reserved: c.reserved, requested: ips, quarantine: c.quarantine,
		record: Record{
			ContainerID: cmd.ContainerID, IfName: cmd.IfName, Netns: cmd.Netns, BootID: bootID, Pod: a.pod,
			HostLink: HostLink(cmd.ContainerID, cmd.IfName), MAC: mac.String(),
		},
	}, mac, nil
}

// attach makes the kernel hold a. What an earlier DEL left to die with its
// namespace may still be in the way, on the host or in the pod.
func (s store) attach(a *attachment, host *rtnl.Conn, ns *netns) error {
	for range maxTries {
		err := a.attach(host, ns)
		if !errors.Is(err, errNameTaken) {
			return err
		}
		link, lookErr := a.inTheWay(host, ns)
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
		if err := deleteLink(host, link); err != nil {
			return err
		}
	}
	return errBusy
}

// inTheWay names our link whose presence keeps a from being made, or none.
func (a *attachment) inTheWay(host *rtnl.Conn, ns *netns) (string, error) {
	if _, err := host.Link(a.hostLink); !isGone(err) {
		return a.hostLink, err
	}
	var inPod rtnl.Link
	err := ns.visit(func() error {
		pod, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer pod.Close()
		inPod, err = pod.Link(a.podLink)
		return err
	})
	if isGone(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	links, err := ourLinks(host)
	for _, l := range links {
		if l.Index == inPod.Peer && l.Peer == inPod.Index {
			return l.Name, nil
		}
	}
	return "", err
}

// owned says whether a link belongs to a recorded attachment other than the
// one whose link is to be called mine. Two attachments share a name once in
// 2^48; then the second is refused.
func (s store) owned(link, mine string) (bool, error) {
	names, _, err := s.names()
	count := 0
	for _, n := range names {
		if HostLink(n.containerID, n.ifName) == link {
			count++
		}
	}
	if link == mine {
		count-- // this attachment's own record
	}
	return count > 0, err
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
	if r.NetnsDevice == ns.device && r.NetnsInode == ns.inode {
		missing, err := drift(host, ns, r.attachment(c))
		if err != nil {
			return err
		}
		if len(missing) == 0 {
			return types.NewError(CodeAttached, "attachment exists already: DEL first",
				fmt.Sprintf("%s of container %s has %v since %s", r.IfName, r.ContainerID, r.Addresses, r.Since))
		}
	}
	if err := deleteLink(host, r.HostLink); err != nil {
		return err
	}
	return h.discard()
}

// attachment is what ADD made of r.
func (r Record) attachment(c *conf) attachment {
	mac, _ := parseMAC(r.MAC)
	return attachment{hostLink: r.HostLink, podLink: r.IfName, podMAC: mac, mtu: c.MTU, addresses: r.Addresses}
}

// result is what ADD prints, behind what a plugin before it in the chain made.
func (a attachment) result(c *conf, sandbox string) *types100.Result {
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
	if !c.DNS.IsEmpty() {
		r.DNS = c.DNS
	}
	return r
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// maxTries bounds how often something is done again that others undo.
const maxTries = 10

// del detaches a pod. Everything may be missing already.
//
// Taking a link down is quick and takes its routes and neighbours along:
// nothing reaches the pod or comes from it any more, and its addresses can
// come back. Deleting a link takes the kernel ten times as long as all the
// rest together, whoever asks; so it is left to die with the pod's namespace,
// which the runtime deletes next. Where there is no namespace, nobody would,
// and it is deleted here. GC, Sweep and an ADD that finds it in its way are
// behind both.
func (p *plugin) del(c *conf, cmd *skel.CmdArgs) error {
	host, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	remove := deleteLink
	if ns, err := openNetns(cmd.Netns); err == nil {
		ns.Close()
		remove = disableLink
	}
	s := openStore(c.DataDir, c.Name)
	for range maxTries {
		n, ok, err := s.find(cmd.ContainerID, cmd.IfName)
		if err != nil {
			return err
		}
		if !ok {
			return remove(host, HostLink(cmd.ContainerID, cmd.IfName))
		}
		h, err := s.hold(n, unix.LOCK_EX)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return err
		}
		defer h.release()
		return h.detach(host, remove)
	}
	return errBusy
}

// disableLink makes a pod unreachable, and its packets go nowhere.
func disableLink(host *rtnl.Conn, name string) error {
	return ignoreGone(host.Do(rtnl.LinkSet{Name: name, Down: true}))
}

func deleteLink(host *rtnl.Conn, name string) error {
	return ignoreGone(host.Do(rtnl.LinkDel{Name: name}))
}

// detach takes an attachment out of the kernel and then out of the store,
// never the other way round: an address comes back only when nothing answers
// for it.
func (h *held) detach(host *rtnl.Conn, remove func(*rtnl.Conn, string) error) error {
	if err := remove(host, HostLink(h.name.containerID, h.name.ifName)); err != nil {
		return err
	}
	return h.free()
}

// check compares what ADD made with what is there.
func (p *plugin) check(c *conf, cmd *skel.CmdArgs) error {
	if err := c.complete(); err != nil {
		return err
	}
	s := openStore(c.DataDir, c.Name)
	n, ok, err := s.find(cmd.ContainerID, cmd.IfName)
	if err != nil {
		return err
	}
	if !ok {
		return types.NewError(types.ErrUnknownContainer, "no record of the attachment",
			fmt.Sprintf("%s of container %s in %s", cmd.IfName, cmd.ContainerID, s.dir))
	}
	text, err := os.ReadFile(s.path(n.String()))
	if err != nil {
		return fmt.Errorf("read record: %w", err)
	}
	r, err := decodeRecord(n, text)
	if err != nil {
		return types.NewError(CodeDrift, "record is corrupt: DEL and ADD the pod", err.Error())
	}
	ns, err := openNetns(cmd.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	host, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	a := r.attachment(c)
	missing := a.adopt(c.prevResult, cmd.IfName, cmd.Netns)
	found, err := drift(host, ns, a)
	if err != nil {
		return err
	}
	if missing = append(missing, found...); len(missing) > 0 {
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
	haveHost, err := facts(host, a.hostLink)
	if err != nil {
		return nil, err
	}
	var havePod []string
	err = ns.visit(func() error {
		pod, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer pod.Close()
		havePod, err = facts(pod, a.podLink)
		return err
	})
	if err != nil {
		return nil, err
	}
	wantHost, wantPod := a.wanted(a.hostLink, a.podLink)
	return append(lacking(wantHost, haveHost, "on the host"), lacking(wantPod, havePod, "in the pod")...), nil
}

func lacking(want, have []string, where string) []string {
	var out []string
	for _, w := range want {
		if !slices.Contains(have, w) {
			out = append(out, w+" ("+where+")")
		}
	}
	return out
}

// gc detaches what the runtime does not list.
func (p *plugin) gc(c *conf, _ *skel.CmdArgs) error {
	host, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	valid := func(containerID, ifName string) bool {
		return slices.Contains(c.ValidAttachments, types.GCAttachment{ContainerID: containerID, IfName: ifName})
	}
	s := openStore(c.DataDir, c.Name)
	names, _, err := s.names()
	if err != nil {
		return err
	}
	var failed []error
	for _, n := range names {
		if valid(n.containerID, n.ifName) {
			continue
		}
		if err := s.detachIdle(host, n); err != nil {
			failed = append(failed, err)
		}
	}
	_, _, err = orphans(host, SweepConfig{DataDir: c.DataDir}, func(r Record) bool { return valid(r.ContainerID, r.IfName) })
	return errors.Join(append(failed, err)...)
}

// detachIdle detaches an attachment that nobody works on.
func (s store) detachIdle(host *rtnl.Conn, n recordName) error {
	h, err := s.hold(n, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, errBusy) || errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer h.release()
	return h.detach(host, deleteLink)
}

// status says whether an ADD would do.
func (p *plugin) status(c *conf, _ *skel.CmdArgs) error {
	if err := c.complete(); err != nil {
		return notReady(err)
	}
	s := openStore(c.DataDir, c.Name)
	if err := s.writable(); err != nil {
		return notReady(err)
	}
	if err := c.daemonReady(); err != nil {
		return notReady(err)
	}
	return s.hasRoom(c)
}

func notReady(err error) error {
	return types.NewError(types.ErrPluginNotAvailable, "not ready for ADD", err.Error())
}

// writable tries what ADD does.
func (s store) writable() error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	temp := s.path(tempPrefix + "status")
	if err := os.WriteFile(temp, []byte("x"), 0o644); err != nil {
		return fmt.Errorf("write to state folder: %w", err)
	}
	return os.Remove(temp)
}

// daemonReady reads the ready file: empty or "ready" is ready, other content
// is the daemon's reason for not being so.
func (c *conf) daemonReady() error {
	if c.ReadyFile == "" {
		return nil
	}
	text, err := os.ReadFile(c.ReadyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("meshd has not said that it is ready (%s is missing): is it running?", filepath.Clean(c.ReadyFile))
	}
	if err != nil {
		return err
	}
	if reason := strings.TrimSpace(string(text)); reason != "" && reason != "ready" {
		return errors.New(reason)
	}
	return nil
}

// hasRoom reports an exhausted range before a pod finds out.
func (s store) hasRoom(c *conf) error {
	names, _, err := s.names()
	if err != nil {
		return notReady(err)
	}
	p := pool{ranges: c.ranges, reserved: c.reserved, held: map[netip.Addr]recordName{}, now: uptime()}
	for _, n := range names {
		for _, a := range n.addresses {
			p.held[a] = n
		}
	}
	if _, err := p.choose(nil); err != nil {
		return notReady(err)
	}
	return nil
}

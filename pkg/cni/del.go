package cni

import (
	"errors"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni/rtnl"
)

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

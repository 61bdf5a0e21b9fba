package cni

import (
	"errors"
	"net/netip"
	"slices"

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
//
// It is the same with the firewall: after a delete in it the kernel lets nobody
// close his socket, and so no plugin end, before an RCU grace period has passed
// (nf_tables flushes what it has to destroy). Host ports are closed whatever it
// takes. That the link may send from its addresses is left to be taken back by
// the daemon, whom the record's going wakes, by GC and Sweep, or by an ADD of
// the same link: until then it is about a link that is down.
func del(c *conf, cmd *call) error {
	host, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	remove := erase
	if ns, err := openNetns(cmd.netns); err == nil {
		ns.Close()
		remove = silence
	}
	s := c.store()
	for range maxTries {
		n, ok, err := s.find(cmd.containerID, cmd.ifName)
		if err != nil {
			return err
		}
		if !ok {
			if err := remove(host, Record{ContainerID: cmd.containerID, IfName: cmd.ifName}); err != nil {
				return err
			}
			return s.giveBackHostLocal(cmd.containerID, cmd.ifName)
		}
		h, err := s.hold(n, unix.LOCK_EX)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return err
		}
		r, err := h.record()
		if err == nil {
			err = h.detach(host, r, remove)
		}
		h.release()
		if err != nil || r.HostLocal == "" {
			return err
		} // else there may be a record for each of its addresses
	}
	return errBusy
}

// silence makes a pod unreachable, and its packets go nowhere.
func silence(host *rtnl.Conn, r Record) error {
	if err := ignoreGone(host.Do(rtnl.LinkSet{Name: HostLink(r.ContainerID, r.IfName), Down: true})); err != nil {
		return err
	}
	if len(r.HostPorts) == 0 && !r.corrupt {
		return nil
	}
	return r.withdraw()
}

// erase takes all of a pod out of the kernel.
func erase(host *rtnl.Conn, r Record) error {
	if err := deleteLink(host, HostLink(r.ContainerID, r.IfName)); err != nil {
		return err
	}
	return r.withdraw()
}

func deleteLink(host *rtnl.Conn, name string) error {
	return ignoreGone(host.Do(rtnl.LinkDel{Name: name}))
}

// detach takes an attachment out of the kernel and then out of the store,
// never the other way round: an address comes back only when nothing answers
// for it.
func (h *held) detach(host *rtnl.Conn, r Record, remove func(*rtnl.Conn, Record) error) error {
	if err := remove(host, r); err != nil {
		return err
	}
	if err := r.removeHostLocal(); err != nil {
		return err
	}
	return h.free()
}

// gc detaches what the runtime does not list.
func gc(c *conf, _ *call) error {
	attachments, err := c.validAttachments()
	if err != nil {
		return err
	}
	host, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	valid := func(containerID, ifName string) bool {
		return slices.Contains(attachments, types.GCAttachment{ContainerID: containerID, IfName: ifName})
	}
	s := c.store()
	var failed []error
	if c.complete() == nil {
		failed = append(failed, s.importForGC(c.ranges))
	}
	names, _, err := s.names()
	if err != nil {
		return err
	}
	for _, n := range names {
		if valid(n.containerID, n.ifName) {
			continue
		}
		if err := s.detachIdle(host, n); err != nil {
			failed = append(failed, err)
		}
	}
	w := sweeper{SweepConfig: SweepConfig{DataDir: c.DataDir, Table: c.Table}, host: host,
		live: func(r Record) bool { return valid(r.ContainerID, r.IfName) }}
	return errors.Join(append(failed, w.orphans())...)
}

// importForGC makes records of host-local's files, so that GC sees them.
func (s store) importForGC(ranges []span) error {
	files, err := s.hostLocalFiles()
	if err != nil || len(files) == 0 {
		return err
	}
	bootID, err := readBootID()
	if err != nil {
		return err
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	_, _, err = s.importHostLocal(bootID, within(ranges), false)
	return err
}

func within(ranges []span) func(netip.Addr) bool {
	return func(a netip.Addr) bool {
		return slices.ContainsFunc(ranges, func(r span) bool { return r.contains(a) })
	}
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
	r, err := h.record()
	if err != nil {
		return err
	}
	return h.detach(host, r, erase)
}

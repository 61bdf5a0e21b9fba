package cni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni/rtnl"
	"meshd.dev/pkg/mesh"
)

// Report says what a sweep did. All empty means that nothing had to be done.
type Report struct {
	// Freed attachments: their namespace was gone, or they were of another boot.
	Freed []Record
	// Links of ours that no record knew, deleted.
	Links []string
	// Unknown links of ours have no record and yet a pod that can be reached,
	// as when the folder was deleted under running pods. They stay.
	Unknown []string
	// Corrupt records that were set aside, by path.
	Corrupt []string
	// Kept counts the attachments that live on.
	Kept int
}

// SweepConfig says what to sweep.
type SweepConfig struct {
	// DataDir as in Network; every network in it is swept.
	DataDir string
	// DryRun only reports.
	DryRun bool
	// Grace is how long an attachment may be unknown to the runtime, which
	// lists a pod only some time after its ADD; a minute if 0.
	Grace time.Duration
}

const defaultGrace = time.Minute

// Pods are the attachments recorded in dataDir, ordered by network, pod and
// interface. Corrupt records are left out and come back as an error beside
// the others. It changes nothing.
func Pods(dataDir string) ([]Record, error) {
	stores, err := networks(dataDir)
	failed := []error{err}
	var all []Record
	for _, s := range stores {
		names, _, err := s.names()
		failed = append(failed, err)
		for _, n := range names {
			text, err := os.ReadFile(s.path(n.String()))
			if errors.Is(err, os.ErrNotExist) {
				continue // deleted meanwhile
			}
			if err != nil {
				failed = append(failed, err)
				continue
			}
			r, err := decodeRecord(n, text)
			if err != nil {
				failed = append(failed, fmt.Errorf("%s: %w", s.path(n.String()), err))
				continue
			}
			r.Network = s.network
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b Record) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), cmp.Compare(a.Pod.Namespace, b.Pod.Namespace),
			cmp.Compare(a.Pod.Name, b.Pod.Name), cmp.Compare(a.ContainerID, b.ContainerID), cmp.Compare(a.IfName, b.IfName))
	})
	return all, errors.Join(failed...)
}

// networks are the folders below dataDir.
func networks(dataDir string) ([]store, error) {
	entries, err := os.ReadDir(dataDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read state folder: %w", err)
	}
	var all []store
	for _, e := range entries {
		if e.IsDir() {
			all = append(all, openStore(dataDir, e.Name()))
		}
	}
	return all, nil
}

// Sweep gives back what died without a DEL: attachments of another boot, those
// whose namespace and host link are both gone, and host links without a
// record. live, if not nil, says what the container runtime knows: an
// attachment it calls live stays; one it does not know (after Grace) goes as soon
// as its namespace is gone, even if something still keeps the link. One whose
// namespace is there, or that an ADD or DEL works on at this moment, always
// stays. Call it in the host's network namespace. Independent failures are
// joined, and the rest is done.
func Sweep(ctx context.Context, cfg SweepConfig, live func(Record) bool) (Report, error) {
	host, err := rtnl.Open()
	if err != nil {
		return Report{}, err
	}
	defer host.Close()
	bootID, err := readBootID()
	if err != nil {
		return Report{}, err
	}
	stores, err := networks(cfg.DataDir)
	failed := []error{err}
	w := sweeper{SweepConfig: cfg, host: host, bootID: bootID, live: live}
	for _, s := range stores {
		if err := ctx.Err(); err != nil {
			return w.report, errors.Join(append(failed, err)...)
		}
		if err := w.network(ctx, s); err != nil {
			failed = append(failed, fmt.Errorf("sweep network %s: %w", s.network, err))
		}
	}
	w.report.Links, w.report.Unknown, err = orphans(host, cfg, live)
	return w.report, errors.Join(append(failed, err)...)
}

type sweeper struct {
	SweepConfig
	host   *rtnl.Conn
	bootID string
	live   func(Record) bool
	report Report
}

func (w *sweeper) network(ctx context.Context, s store) error {
	if !w.DryRun {
		if err := w.enterBoot(s); err != nil {
			return err
		}
	}
	names, _, err := s.names()
	failed := []error{err}
	for _, n := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		failed = append(failed, w.attachment(s, n))
	}
	return errors.Join(failed...)
}

// enterBoot does what the first ADD of a boot would do, and clears away
// temporary files of the dead.
func (w *sweeper) enterBoot(s store) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	_, stale, err := s.names()
	s.removeStale(stale)
	if err != nil {
		return err
	}
	voided, corrupt, err := s.enterBoot(w.bootID)
	w.report.Freed = append(w.report.Freed, voided...)
	w.report.Corrupt = append(w.report.Corrupt, corrupt...)
	return err
}

func (w *sweeper) attachment(s store, n recordName) error {
	h, err := s.hold(n, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, errBusy) {
		w.report.Kept++
		return nil
	}
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer h.release()
	r, err := h.read()
	corrupt := errors.Is(err, errCorrupt)
	if err != nil && !corrupt {
		return err
	}
	if corrupt {
		if err := w.setAside(h); err != nil {
			return err
		}
		// All that can be trusted is the name.
		r = Record{Network: s.network, ContainerID: n.containerID, IfName: n.ifName, Addresses: n.addresses, BootID: w.bootID,
			HostLink: HostLink(n.containerID, n.ifName)}
	}
	dead, err := w.dead(r)
	if err != nil {
		return err
	}
	if !dead {
		w.report.Kept++
		return nil
	}
	w.report.Freed = append(w.report.Freed, r)
	if w.DryRun {
		return nil
	}
	return h.detach(w.host, deleteLink)
}

func (w *sweeper) setAside(h *held) error {
	if h.name.corrupt {
		return nil
	}
	if !w.DryRun {
		if err := h.setAside(); err != nil {
			return err
		}
	}
	w.report.Corrupt = append(w.report.Corrupt, h.store.path(h.name.String()))
	return nil
}

// dead asks three witnesses: the boot, the namespace, and the link (which
// lives exactly as long as the namespace, whoever hides the namespace's path).
// The runtime can speak for a pod, and stand in for the link against it.
func (w *sweeper) dead(r Record) (bool, error) {
	if r.BootID != w.bootID {
		return true, nil
	}
	if r.Netns != "" && netnsIs(r.Netns, r.NetnsDevice, r.NetnsInode) {
		return false, nil
	}
	if w.live != nil {
		if w.live(r) {
			return false, nil
		}
		if r.Netns != "" && uptime()-r.Uptime > cmp.Or(w.Grace, defaultGrace) {
			return true, nil
		}
	}
	_, err := w.host.Link(r.HostLink)
	if err == nil {
		return false, nil
	}
	return isGone(err), ignoreGone(err)
}

// orphans deletes host links that no record in dataDir knows. One that still
// has its host route serves a pod whose record was lost: it goes only if live
// is there to say that the pod does not. Links are listed before records are
// read: a record is there before its link is, and so an ADD at work is never
// mistaken.
func orphans(host *rtnl.Conn, cfg SweepConfig, live func(Record) bool) (deleted, unknown []string, err error) {
	links, err := ourLinks(host)
	if err != nil || len(links) == 0 {
		return nil, nil, err
	}
	known, err := knownLinks(cfg.DataDir)
	if err != nil {
		return nil, nil, err // knowing half of them would delete the others
	}
	var failed []error
	for _, l := range links {
		if known[l.Name] {
			continue
		}
		keep, err := serves(host, l, live)
		switch {
		case err != nil:
			failed = append(failed, err)
			continue
		case keep:
			unknown = append(unknown, l.Name)
			continue
		case !cfg.DryRun:
			if err := deleteLink(host, l.Name); err != nil {
				failed = append(failed, err)
				continue
			}
		}
		deleted = append(deleted, l.Name)
	}
	return deleted, unknown, errors.Join(failed...)
}

// ourLinks are the host's ends of pods.
func ourLinks(host *rtnl.Conn) ([]rtnl.Link, error) {
	links, err := host.Links()
	return slices.DeleteFunc(links, func(l rtnl.Link) bool {
		return l.Kind != "veth" || !strings.HasPrefix(l.Name, mesh.PodLinkPrefix)
	}), err
}

// serves says whether a link without a record has a pod behind it.
func serves(host *rtnl.Conn, l rtnl.Link, live func(Record) bool) (bool, error) {
	routes, err := host.Routes(l.Index)
	if err != nil {
		return false, err
	}
	if !slices.ContainsFunc(routes, func(r rtnl.Route) bool { return r.Protocol == mesh.PodRouteProtocol }) {
		return false, nil
	}
	r, ok := parseAlias(l.Alias)
	return live == nil || !ok || live(r), nil
}

func knownLinks(dataDir string) (map[string]bool, error) {
	stores, err := networks(dataDir)
	if err != nil {
		return nil, err
	}
	known := map[string]bool{}
	for _, s := range stores {
		names, _, err := s.names()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Base(s.dir), err)
		}
		for _, n := range names {
			known[HostLink(n.containerID, n.ifName)] = true
		}
	}
	return known, nil
}

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

// Report says what a sweep did, or would do. All empty means nothing.
type Report struct {
	// Freed attachments, and why.
	Freed []Freed
	// Links of ours that no record knew, deleted.
	Links []string
	// Elements of the firewall that no record knew, deleted, as commands.
	Elements []string
	// Unknown links of ours have no record and yet a pod that can be reached,
	// as when the folder was deleted under running pods, and do not say whose
	// they are. They stay.
	Unknown []string
	// Rebuilt records of links that serve a pod and had none.
	Rebuilt []Record
	// Imported attachments of host-local: its addresses are taken over.
	Imported []Record
	// Corrupt records that were set aside, and files of host-local that do not
	// say whose they are, by path. Their addresses stay taken.
	Corrupt []string
	// Kept counts the attachments that live on.
	Kept int
}

// Freed is an attachment that was given back.
type Freed struct {
	Record
	Why string
}

// Lines are what a sweep gave back, or took over, a line each with the reason.
func (r Report) Lines() []string {
	var out []string
	for _, f := range r.Freed {
		out = append(out, fmt.Sprintf("%s: %s", f.Record.text(), f.Why))
	}
	for _, l := range r.Links {
		out = append(out, fmt.Sprintf("link %s: no record knows it", l))
	}
	for _, e := range r.Elements {
		out = append(out, fmt.Sprintf("%s: no record knows it", e))
	}
	for _, b := range r.Rebuilt {
		out = append(out, fmt.Sprintf("%s: its record was lost, and is written again from link %s", b.text(), b.HostLink))
	}
	for _, i := range r.Imported {
		out = append(out, fmt.Sprintf("%s: taken over from host-local (%s)", i.text(), i.HostLocal))
	}
	return out
}

// text says what a record is about.
func (r Record) text() string {
	addrs := make([]string, len(r.Addresses))
	for i, a := range r.Addresses {
		addrs[i] = a.String()
	}
	pod := ""
	if r.Pod.Name != "" {
		pod = fmt.Sprintf(", pod %s/%s", r.Pod.Namespace, r.Pod.Name)
	}
	return fmt.Sprintf("%s of %s in container %.12s%s", strings.Join(addrs, " and "), r.IfName, r.ContainerID, pod)
}

// SweepConfig says what to sweep.
type SweepConfig struct {
	// DataDir as in Network; every network in it is swept.
	DataDir string
	// Table of the firewall as in Network; empty for none.
	Table string
	// Import, if not nil, is the network that takes over what host-local has
	// in use in its pod CIDRs, and pods whose records were lost.
	Import *Network
	// DryRun only reports.
	DryRun bool
	// Grace is how long an attachment may be unknown to the runtime, which
	// lists a pod only some time after its ADD; a minute if 0.
	Grace time.Duration

	hostLocal string // in tests
}

const defaultGrace = time.Minute

// Pods are the attachments recorded in dataDir, ordered by network, pod and
// interface. Corrupt records are left out and come back as an error beside
// the others. It changes nothing.
func Pods(dataDir string) ([]Record, error) {
	var all []Record
	err := eachRecord(dataDir, func(s store, n recordName, r Record, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", s.path(n.String()), err)
		}
		all = append(all, r)
		return nil
	})
	slices.SortFunc(all, func(a, b Record) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), cmp.Compare(a.Pod.Namespace, b.Pod.Namespace),
			cmp.Compare(a.Pod.Name, b.Pod.Name), cmp.Compare(a.ContainerID, b.ContainerID), cmp.Compare(a.IfName, b.IfName))
	})
	return all, err
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
	if cfg.Import != nil {
		failed = append(failed, w.importHostLocal(*cfg.Import))
	}
	for _, s := range stores {
		if err := ctx.Err(); err != nil {
			return w.report, errors.Join(append(failed, err)...)
		}
		if err := w.network(ctx, s); err != nil {
			failed = append(failed, fmt.Errorf("sweep network %s: %w", s.network, err))
		}
	}
	return w.report, errors.Join(append(failed, w.orphans())...)
}

// importHostLocal takes over what host-local has in use.
func (w *sweeper) importHostLocal(n Network) error {
	n.setDefaults()
	s := openStore(n.DataDir, n.Name)
	s.hostLocal = cmp.Or(w.hostLocal, defaultHostLocalDir)
	if files, err := s.hostLocalFiles(); err != nil || len(files) == 0 {
		return err
	}
	if !w.DryRun {
		unlock, err := s.lock()
		if err != nil {
			return err
		}
		defer unlock()
		voided, corrupt, err := s.enterBoot(w.bootID) // first: what it knows of another boot is void
		w.voided(voided)
		w.report.Corrupt = append(w.report.Corrupt, corrupt...)
		if err != nil {
			return err
		}
	}
	made, corrupt, err := s.importHostLocal(w.bootID, within(spans(n.PodCIDRs)), w.DryRun)
	w.report.Imported = append(w.report.Imported, made...)
	w.report.Corrupt = append(w.report.Corrupt, corrupt...)
	return err
}

func (w *sweeper) voided(records []Record) {
	for _, r := range records {
		w.report.Freed = append(w.report.Freed, Freed{r, anotherBoot})
	}
}

const anotherBoot = "it is of another boot"

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
	w.voided(voided)
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
		r = n.record(s.network) // all that can be trusted
		r.BootID = w.bootID
	}
	why, err := w.dead(r)
	if err != nil {
		return err
	}
	if why == "" {
		w.report.Kept++
		return nil
	}
	w.report.Freed = append(w.report.Freed, Freed{r, why})
	if w.DryRun {
		return nil
	}
	return h.detach(w.host, r, erase)
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

// dead says why an attachment is, or nothing. It asks three witnesses: the
// boot, the namespace, and the link (which lives exactly as long as the
// namespace, whoever hides the namespace's path). The runtime can speak for a
// pod, and stand in for the link against it.
func (w *sweeper) dead(r Record) (why string, err error) {
	if r.BootID != w.bootID {
		return anotherBoot, nil
	}
	if r.Netns != "" && netnsIs(r.Netns, r.NetnsDevice, r.NetnsInode) {
		return "", nil
	}
	if r.HostLocal != "" && r.hostLocalGone() {
		return "host-local gave it back", nil
	}
	if w.live != nil {
		if w.live(r) {
			return "", nil
		}
		if (r.Netns != "" || r.HostLocal != "") && uptime()-r.Uptime > cmp.Or(w.Grace, defaultGrace) {
			return "the container runtime does not know the container", nil
		}
	}
	if r.HostLocal != "" {
		return "", nil // it has no link of ours that could speak
	}
	_, err = w.host.Link(r.HostLink)
	if isGone(err) {
		return fmt.Sprintf("its network namespace %s and its link %s are gone", r.Netns, r.HostLink), nil
	}
	return "", err
}

// orphans deletes what no record in DataDir knows: host links, and elements of
// the firewall. A link that still has its host route serves a pod whose record
// was lost: it goes only if live is there to say that the pod does not. The
// kernel is read before the records: a record is there before what it is
// about, and so an ADD at work is never mistaken.
func (w *sweeper) orphans() error {
	links, err := ourLinks(w.host)
	if err != nil {
		return err
	}
	elements, err := podElements(w.Table)
	if err != nil || len(links)+len(elements) == 0 {
		return err
	}
	known, err := w.known()
	if err != nil {
		return err // knowing half of them would delete the others
	}
	var failed []error
	for _, l := range links {
		if !known.links[l.Name] {
			failed = append(failed, w.orphanLink(l, known))
		}
	}
	for _, e := range elements {
		if !known.has(e) {
			failed = append(failed, w.orphanElement(e))
		}
	}
	return errors.Join(failed...)
}

func (w *sweeper) orphanLink(l rtnl.Link, known known) error {
	keep, err := serves(w.host, l, w.live)
	if err != nil {
		return err
	}
	if keep {
		known.links[l.Name] = true // its elements stay as well
		rebuilt, err := w.rebuild(l)
		if err == nil && !rebuilt {
			w.report.Unknown = append(w.report.Unknown, l.Name)
		}
		return err
	}
	if !w.DryRun {
		if err := deleteLink(w.host, l.Name); err != nil {
			return err
		}
	}
	w.report.Links = append(w.report.Links, l.Name)
	return nil
}

// rebuild writes the record of a link that serves a pod, from what the kernel
// has of it: so that nobody else gets its addresses, and the firewall goes on
// letting it through. Its namespace is not known; its link speaks for it.
func (w *sweeper) rebuild(l rtnl.Link) (bool, error) {
	r, ok := parseAlias(l.Alias)
	if w.Import == nil || !ok || r.HostLink != l.Name {
		return false, nil
	}
	routes, err := w.host.Routes(l.Index)
	if err != nil {
		return false, err
	}
	for _, rt := range routes {
		if rt.Protocol == mesh.PodRouteProtocol && rt.Dst.IsSingleIP() && len(r.Addresses) < maxAddresses {
			r.Addresses = append(r.Addresses, rt.Dst.Addr())
		}
	}
	neighs, err := w.host.Neighs(l.Index)
	if err != nil || len(r.Addresses) == 0 {
		return false, err
	}
	for _, n := range neighs {
		r.MAC = n.MAC.String()
	}
	n := *w.Import
	n.setDefaults()
	r.Network, r.BootID, r.Table, r.Uptime, r.Since = n.Name, w.bootID, w.Table, uptime(), time.Now().UTC().Truncate(time.Second)
	w.report.Rebuilt = append(w.report.Rebuilt, r)
	if w.DryRun {
		return true, nil
	}
	s := openStore(w.DataDir, n.Name)
	unlock, err := s.lock()
	if err != nil {
		return false, err
	}
	defer unlock()
	return true, s.keep(r)
}

func (w *sweeper) orphanElement(e mesh.SetElement) error {
	op := rtnl.ElementDel{Table: w.Table, SetElement: e}
	w.report.Elements = append(w.report.Elements, op.String())
	if w.DryRun {
		return nil
	}
	nf, err := rtnl.OpenNetfilter()
	if err != nil {
		return err
	}
	defer nf.Close()
	// Added first: then it goes only if it is still the one that was read, and
	// a pod that has the port by now keeps it.
	err = nf.Do(rtnl.ElementAdd(op), op)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
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

// known is what records are about: links, and addresses as the kernel has them.
type known struct{ links, addrs map[string]bool }

func (w *sweeper) known() (known, error) {
	k := known{map[string]bool{}, map[string]bool{}}
	stores, err := networks(w.DataDir)
	if err != nil {
		return k, err
	}
	for _, s := range stores {
		names, _, err := s.names()
		if err != nil {
			return k, fmt.Errorf("%s: %w", filepath.Base(s.dir), err)
		}
		for _, n := range names {
			k.links[HostLink(n.containerID, n.ifName)] = true
			for _, a := range n.addresses {
				k.addrs[string(a.AsSlice())] = true
			}
		}
	}
	return k, nil
}

// has says whether an element is about a pod with a record: by its link, else
// by the address it leads to.
func (k known) has(e mesh.SetElement) bool {
	if strings.HasPrefix(e.Set, mesh.PodSet) {
		return k.links[strings.TrimRight(e.Key[:min(len(e.Key), unix.IFNAMSIZ)], "\x00")]
	}
	first, size := cmp.Or(e.Value, e.Key), 16
	if strings.HasSuffix(e.Set, "4") {
		size = 4
	}
	return k.addrs[first[:min(len(first), size)]]
}

// podElements are all elements of pods in a table; none if there is no table.
func podElements(table string) (all []mesh.SetElement, err error) {
	if table == "" {
		return nil, nil
	}
	nf, err := rtnl.OpenNetfilter()
	if err != nil {
		return nil, err
	}
	defer nf.Close()
	for _, set := range []string{mesh.PodSet, mesh.HostPortMap, mesh.HairpinSet} {
		for _, f := range []string{"4", "6"} {
			have, err := nf.Elements(table, set+f)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return nil, err
			}
			all = append(all, have...)
		}
	}
	return all, nil
}

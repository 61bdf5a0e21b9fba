package cni

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// host-local is the allocator of flannel, kilo, bridge and ptp. It keeps a
// folder a network, below /var/lib/cni/networks, and in it a file an address:
//
//	10.244.1.7      container ID, CR LF, interface
//	last_reserved_ip.0, lock
//
// Who comes from there has pods running when this plugin takes over, with
// addresses out of the same ranges. An address with a file is never given to
// anybody. Sweep makes records of the files, so that a pod is seen, given back
// by a DEL or GC of ours (the runtime calls the plugin of today's
// configuration, not the one that attached the pod), and forgotten with the
// boot it ran in, which host-local's files do not know.

// hostLocalFile is one address in use.
type hostLocalFile struct {
	path string
	addr netip.Addr
}

// hostLocalFiles lists the addresses in use, in all of host-local's networks:
// those outside of our ranges do no harm.
func (s store) hostLocalFiles() ([]hostLocalFile, error) {
	if s.hostLocal == "" {
		return nil, nil
	}
	folders, err := readNames(s.hostLocal)
	if err != nil {
		return nil, fmt.Errorf("addresses of host-local: %w", err)
	}
	var all []hostLocalFile
	for _, folder := range folders {
		dir := filepath.Join(s.hostLocal, folder)
		files, err := readNames(dir)
		if errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("addresses of host-local: %w", err)
		}
		for _, f := range files {
			if a, err := netip.ParseAddr(f); err == nil && a.Zone() == "" {
				all = append(all, hostLocalFile{filepath.Join(dir, f), a.Unmap()})
			}
		}
	}
	slices.SortFunc(all, func(a, b hostLocalFile) int { return strings.Compare(a.path, b.path) })
	return all, nil
}

// errHostLocal marks a file that does not say whose it is.
var errHostLocal = errors.New("does not say which container has the address; if none has, remove the file")

// maxHostLocal bounds what is read of a file; real ones have 70 bytes.
const maxHostLocal = 1 << 10

// owner reads who has the address. Old versions wrote no interface.
func (f hostLocalFile) owner() (containerID, ifName string, err error) {
	text, err := os.ReadFile(f.path)
	if err != nil {
		return "", "", err
	}
	return parseHostLocal(text)
}

func parseHostLocal(text []byte) (containerID, ifName string, err error) {
	if len(text) > maxHostLocal {
		return "", "", errHostLocal
	}
	id, name, _ := bytes.Cut(text, []byte("\n"))
	containerID, ifName = strings.TrimSpace(string(id)), strings.TrimSpace(string(name))
	if ifName == "" {
		ifName = "eth0"
	}
	plain := func(s string, max int) bool {
		return s != "" && len(s) <= max && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == ',' })
	}
	if !plain(containerID, maxContainerID) || !plain(ifName, unix.IFNAMSIZ-1) || strings.HasSuffix(containerID, corruptSuffix) {
		return "", "", errHostLocal
	}
	return containerID, ifName, nil
}

// importHostLocal makes records of files that have none yet. Call it with the
// lock. It returns those made, and the files it could not read.
func (s store) importHostLocal(bootID string, wanted func(netip.Addr) bool, dryRun bool) (made []Record, corrupt []string, err error) {
	files, err := s.hostLocalFiles()
	if err != nil || len(files) == 0 {
		return nil, nil, err
	}
	names, _, err := s.names()
	if err != nil {
		return nil, nil, err
	}
	for _, f := range files {
		if !wanted(f.addr) || slices.ContainsFunc(names, func(n recordName) bool { return slices.Contains(n.addresses, f.addr) }) {
			continue
		}
		id, ifName, err := f.owner()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // given back meanwhile
		case errors.Is(err, errHostLocal):
			corrupt = append(corrupt, f.path)
			continue
		case err != nil:
			return made, corrupt, err
		}
		r := Record{Network: s.network, ContainerID: id, IfName: ifName, BootID: bootID, Addresses: []netip.Addr{f.addr}, HostLocal: f.path,
			Since: time.Now().UTC().Truncate(time.Second), Uptime: uptime()}
		if !dryRun {
			if err := s.keep(r); err != nil {
				return made, corrupt, err
			}
		}
		made = append(made, r)
	}
	return made, corrupt, nil
}

// keep writes a record that nobody holds.
func (s store) keep(r Record) error {
	h, err := s.create(r, nil)
	if err != nil {
		return err
	}
	defer h.release()
	return h.f.Sync()
}

// removeHostLocal takes host-local's file away before the record of it goes:
// else it would come back with the next sweep.
func (r Record) removeHostLocal() error {
	if r.HostLocal == "" {
		return nil
	}
	if err := os.Remove(r.HostLocal); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("give back %v of host-local: %w", r.Addresses, err)
	}
	return nil
}

// giveBackHostLocal does what host-local's own DEL would do, for a container
// that it attached and of which there is no record yet.
func (s store) giveBackHostLocal(containerID, ifName string) error {
	files, err := s.hostLocalFiles()
	if err != nil {
		return err
	}
	var failed []error
	for _, f := range files {
		if id, name, err := f.owner(); err == nil && id == containerID && name == ifName {
			failed = append(failed, Record{HostLocal: f.path, Addresses: []netip.Addr{f.addr}}.removeHostLocal())
		}
	}
	return errors.Join(failed...)
}

// void removes a record of another boot.
func (h *held) void(r Record) error {
	if err := r.removeHostLocal(); err != nil {
		return err
	}
	return h.discard()
}

// hostLocalGone says whether the plugin that attached the pod gave it back.
func (r Record) hostLocalGone() bool {
	_, err := os.Lstat(r.HostLocal)
	return errors.Is(err, fs.ErrNotExist)
}

package cni

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"meshd.dev/pkg/mesh"
)

// Attached lists the pods of this boot as the firewall has to know them, those
// attached first first. One whose record is corrupt or cannot be read keeps its
// addresses and loses its host ports, since those are not known. An error means
// that the list may lack some.
func Attached(dataDir string) ([]mesh.LocalPod, error) {
	bootID, err := readBootID()
	if err != nil {
		return nil, err
	}
	var records []Record
	err = eachRecord(dataDir, func(_ store, n recordName, r Record, err error) error {
		if err != nil { // one bad sector must not hold up what becomes of the other pods
			r = n.record("")
			r.BootID = bootID
		}
		if r.BootID == bootID && r.HostLink != "" {
			records = append(records, r)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(records, func(a, b Record) int {
		return cmp.Or(cmp.Compare(a.Uptime, b.Uptime), cmp.Compare(a.HostLink, b.HostLink))
	})
	pods := make([]mesh.LocalPod, len(records))
	for i, r := range records {
		pods[i] = r.local()
	}
	return pods, nil
}

// eachRecord reads all records below dataDir and gives each to f, with the
// error of reading it. Errors of f are joined.
func eachRecord(dataDir string, f func(store, recordName, Record, error) error) error {
	stores, err := networks(dataDir)
	failed := []error{err}
	for _, s := range stores {
		names, _, err := s.names()
		failed = append(failed, err)
		for _, n := range names {
			r, err := s.peek(n)
			if errors.Is(err, errGone) {
				continue // deleted meanwhile
			}
			failed = append(failed, f(s, n, r, err))
		}
	}
	return errors.Join(failed...)
}

// Usage of one family's addresses.
type Usage struct {
	// Ranges of the family.
	Ranges []string
	// Held by pods, in quarantine, and free at this moment; Free stops
	// counting at 1000.
	Held, Resting, Free int
}

// Addresses says how many addresses of n are left, IPv4 first.
func Addresses(n Network) ([]Usage, error) {
	n.setDefaults()
	s := openStore(n.DataDir, n.Name)
	s.hostLocal = defaultHostLocalDir
	p, err := s.pool(spans(n.PodCIDRs), nil, defaultQuarantine)
	if err != nil {
		return nil, err
	}
	var all []Usage
	for _, is4 := range []bool{true, false} {
		if ranges := p.of(is4); len(ranges) > 0 {
			all = append(all, p.usage(ranges))
		}
	}
	return all, nil
}

// countTo bounds how much of a large range is counted.
const countTo = 1000

func (p pool) usage(ranges []span) Usage {
	var u Usage
	for _, r := range ranges {
		u.Ranges = append(u.Ranges, r.String())
		for a := r.start(); r.usable(a) && u.Free < countTo; a = a.Next() {
			_, held := p.held[a]
			at, freed := p.freed[a]
			switch {
			case held, slices.Contains(p.reserved, a):
				u.Held++
			case freed && p.now-at < p.quarantine:
				u.Resting++
			default:
				u.Free++
			}
		}
	}
	return u
}

// Exhausted is an error when a family has no address left for another pod.
func Exhausted(all []Usage) error {
	var failed []error
	for _, u := range all {
		if u.Free+u.Resting == 0 {
			failed = append(failed, fmt.Errorf("all %d addresses of %v are taken", u.Held, u.Ranges))
		}
	}
	return errors.Join(failed...)
}

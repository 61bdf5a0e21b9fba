package shortcut

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// read looks at the links of the pods. l is nil when no link may have the
// program; refused says which may not, by index, and why.
func read(pods []mesh.LocalPod, l *loaded, refused map[int]string) (state, error) {
	have := state{addrs: map[netip.Addr]int{}, local: map[netip.Addr]bool{}}
	names := map[ebpf.ProgramID]bool{}
	if l != nil {
		have.program = l.id
		names[l.id] = true
		if err := l.read(have.addrs); err != nil {
			return have, err
		}
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return have, fmt.Errorf("list links: %w", err)
	}
	queued, err := queues()
	if err != nil {
		return have, err
	}
	records := map[string][]netip.Addr{}
	for _, p := range pods {
		records[p.Link] = p.Addrs
		add(have.local, p.Addrs)
	}
	for _, kl := range links {
		name, index := kl.Attrs().Name, kl.Attrs().Index
		if kl.Type() != "veth" || !strings.HasPrefix(name, mesh.PodLinkPrefix) {
			continue
		}
		pl := podLink{name: name, index: index, addrs: records[name]}
		if gone := pl.look(names); gone {
			continue
		}
		if pl.why = refused[index]; pl.why == "" {
			pl.why = whyNot(pl, kl.Attrs().Flags&net.FlagUp != 0, queued[index], have.addrs)
		}
		pl.short = l != nil && pl.why == ""
		have.links = append(have.links, pl)
	}
	return have, nil
}

// whyNot says why a link may not have the program. A queue is a limit of the
// pod's bandwidth, which the shortcut would go around, as it would a program of
// somebody else's, who may filter or count. Routes are the last
// thing that makes a pod, so one that has them has everything else.
func whyNot(l podLink, up bool, queue string, known map[netip.Addr]int) string {
	switch {
	case len(l.addrs) == 0:
		return "no pod is recorded for it"
	case !up:
		return "it is down"
	case queue != "":
		return "it has a queue (" + queue + ")"
	case l.foreign != "":
		return l.foreign
	}
	for _, a := range l.addrs {
		if known[a] == l.index {
			continue // and the program itself asks the routes
		}
		routes, err := netlink.RouteGet(a.AsSlice())
		if err != nil || len(routes) == 0 || routes[0].LinkIndex != l.index {
			return "no route leads to it yet"
		}
	}
	return ""
}

// queues of links that have one, or filters, by index.
func queues() (map[int]string, error) {
	all, err := netlink.QdiscList(nil)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list queues: %w", err)
	}
	queued := map[int]string{}
	for _, q := range all {
		if q.Type() != "noqueue" {
			queued[q.Attrs().LinkIndex] = q.Type()
		}
	}
	return queued, nil
}

// look for programs at the link's hooks, unless it is gone. names is what this
// round has already found out about programs.
func (l *podLink) look(names map[ebpf.ProgramID]bool) (gone bool) {
	for _, hook := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		have, err := programs(l.index, hook)
		switch {
		case errors.Is(err, ebpf.ErrNotSupported):
			return false
		case orGone(err, l.index) != nil:
			l.foreign, l.unseen = "its programs cannot be listed: "+err.Error(), true
			return false
		case err != nil:
			return true
		}
		for _, p := range have.Programs {
			l.sort(p, hook, names)
		}
	}
	return false
}

// sort a program at a hook of the link into ours and foreign ones. What a BPF
// link holds is somebody else's.
func (l *podLink) sort(p link.AttachedProgram, hook ebpf.AttachType, names map[ebpf.ProgramID]bool) {
	is, known := names[p.ID]
	if !known {
		var err error
		if is, err = isOurs(p.ID); errors.Is(err, unix.ENOENT) {
			return // gone since it was listed
		} else if err != nil {
			l.foreign, l.unseen = fmt.Sprintf("it has a program that cannot be looked at (id %d): %v", p.ID, err), true
			return
		}
		names[p.ID] = is
	}
	if _, held := p.LinkID(); is && !held && hook == ebpf.AttachTCXIngress {
		l.programs = append(l.programs, p.ID)
	} else if l.foreign == "" {
		l.foreign = fmt.Sprintf("it has a program of somebody else (id %d)", p.ID)
	}
}

func isOurs(id ebpf.ProgramID) (bool, error) {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return false, err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return false, err
	}
	return info.Name == programName, nil
}

// haveTCX says whether programs can be attached at all.
func haveTCX() error {
	const loopback = 1 // in every namespace
	_, err := programs(loopback, ebpf.AttachTCXIngress)
	return err
}

// programs at a hook of a link. A kernel that can list programs, but none of
// this kind, calls the question invalid.
func programs(index int, hook ebpf.AttachType) (*link.QueryResult, error) {
	have, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: hook})
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w: %w", ebpf.ErrNotSupported, err)
	}
	return have, err
}

// read adds what the maps hold.
func (l *loaded) read(addrs map[netip.Addr]int) error {
	var index uint32
	var key4 [4]byte
	all := l.pods4.Iterate()
	for all.Next(&key4, &index) {
		addrs[netip.AddrFrom4(key4)] = int(index)
	}
	var key6 [16]byte
	all6 := l.pods6.Iterate()
	for all6.Next(&key6, &index) {
		addrs[netip.AddrFrom16(key6)] = int(index)
	}
	return errors.Join(all.Err(), all6.Err())
}

// do one change; detach and forget need no program.
func (l *loaded) do(o op) error {
	switch o.verb {
	case "map":
		return l.pods(o.addr).Put(o.addr.AsSlice(), uint32(o.link.index))
	case "unmap":
		if err := l.pods(o.addr).Delete(o.addr.AsSlice()); !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		return nil
	case "attach":
		return orGone(l.attach(o), o.link.index)
	case "detach":
		return orGone(l.detach(o), o.link.index)
	}
	leaving := map[netip.Addr]bool{}
	add(leaving, o.leaving)
	return forget(leaving, o.local)
}

func (l *loaded) pods(a netip.Addr) *ebpf.Map {
	if a.Is4() {
		return l.pods4
	}
	return l.pods6
}

func (l *loaded) attach(o op) error {
	opts := link.RawAttachProgramOptions{Target: o.link.index, Program: l.program, Attach: ebpf.AttachTCXIngress}
	if o.program != 0 {
		old, err := ebpf.NewProgramFromID(o.program)
		if err != nil {
			return err
		}
		defer old.Close()
		opts.Anchor = link.ReplaceProgram(old)
	}
	return link.RawAttachProgram(opts)
}

func (l *loaded) detach(o op) error {
	if l != nil && o.program == l.id { // which needs no right to look for it
		return detach(o.link.index, l.program)
	}
	p, err := ebpf.NewProgramFromID(o.program)
	if errors.Is(err, unix.ENOENT) {
		return nil // gone, and so from the link
	} else if err != nil {
		return err
	}
	defer p.Close()
	return detach(o.link.index, p)
}

func detach(index int, p *ebpf.Program) error {
	return link.RawDetachProgram(link.RawDetachProgramOptions{Target: index, Program: p, Attach: ebpf.AttachTCXIngress})
}

// orGone is err, unless the link it is about is gone.
func orGone(err error, index int) error {
	if err == nil {
		return nil
	}
	if _, gone := netlink.LinkByIndex(index); errors.As(gone, new(netlink.LinkNotFoundError)) {
		return nil
	}
	return err
}

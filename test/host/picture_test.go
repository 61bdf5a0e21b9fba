package host

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// ours is what meshd's objects have in a line of ip(8): its links, the protocols
// of its routes.
var ours = regexp.MustCompile(`\bmesh0|\bmsh[0-9a-f]{12}|proto 7[78]\b`)

// genMode is how the kernel makes up IPv6 addresses when a link comes up. A
// NetworkManager that ends sets it to the kernel's default on every link, those
// it was to leave alone as well; of the addresses themselves pictures tell.
var genMode = regexp.MustCompile(`addrgenmode \w+ `)

// picture is all that is ours in the kernel of a machine, a line an object:
// links, addresses, routes, neighbours, and the settings of the links.
func picture(ctx context.Context, m *netlab.Machine) (string, error) {
	out, err := m.Run(ctx, "sh", "-c", `ip -d -o link show; ip -o address show; ip route show table all; ip -6 route show table all
ip neigh show nud permanent; ip -6 neigh show nud permanent
cd /proc/sys/net && grep -s . ipv4/conf/mesh0*/* ipv6/conf/mesh0*/* ipv4/conf/msh*/* ipv6/conf/msh*/*; true`)
	if err != nil {
		return "", err
	}
	lines := slices.DeleteFunc(strings.Split(out, "\n"), func(l string) bool { return !ours.MatchString(l) || strings.Contains(l, "/addr_gen_mode:") })
	for i, l := range lines {
		lines[i] = genMode.ReplaceAllString(l, "")
	}
	rules, err := m.Run(ctx, "sh", "-c", "ip rule; ip -6 rule; nft -s list table inet meshd")
	return strings.Join(lines, "\n") + "\n" + rules, err
}

// differ says which lines two pictures do not share.
func differ(before, after string) error {
	was, is := strings.Split(before, "\n"), strings.Split(after, "\n")
	var diff []string
	for _, l := range was {
		if !slices.Contains(is, l) {
			diff = append(diff, "- "+l)
		}
	}
	for _, l := range is {
		if !slices.Contains(was, l) {
			diff = append(diff, "+ "+l)
		}
	}
	if len(diff) == 0 && len(was) == len(is) {
		return nil
	}
	return fmt.Errorf("%d lines were, %d are:\n%s", len(was), len(is), strings.Join(diff[:min(len(diff), 40)], "\n"))
}

// A watch hears of every change of what is ours.
type watch struct {
	m   *netlab.Machine
	log string
	pid int
}

// mark is a route of nobody, by which a watch knows how far it has heard.
const mark = "192.0.2.%d/32 dev lo proto 99"

// listen starts a watch and waits until it hears.
func listen(ctx context.Context, m *netlab.Machine) (*watch, error) {
	if _, err := m.Run(ctx, "rm", "-f", "/var/log/monitor.log"); err != nil {
		return nil, err
	}
	pid, err := m.Start(ctx, "monitor", "ip", "-o", "monitor", "link", "address", "route", "rule")
	w := &watch{m: m, pid: pid}
	if err != nil {
		return nil, err
	}
	return w, w.hear(ctx, 1)
}

// hear waits until the watch heard of a mark, and so of all before.
func (w *watch) hear(ctx context.Context, n int) error {
	route := strings.Fields(fmt.Sprintf(mark, n))
	return cluster.Until(ctx, func(ctx context.Context) error {
		for _, verb := range []string{"add", "del"} {
			if _, err := w.m.Run(ctx, append([]string{"ip", "route", verb}, route...)...); err != nil {
				return err
			}
		}
		var err error
		if w.log, err = w.m.Run(ctx, "cat", "/var/log/monitor.log"); err != nil {
			return err
		}
		if !strings.Contains(w.log, "Deleted "+strings.TrimSuffix(route[0], "/32")+" ") {
			return fmt.Errorf("ip monitor has not heard of route %s:\n%s", route[0], w.log)
		}
		return nil
	})
}

// end is what was heard of changes of what is ours.
func (w *watch) end(ctx context.Context) ([]string, error) {
	err := w.hear(ctx, 2)
	if kill := netlab.Kill(ctx, w.pid); err == nil {
		err = kill
	}
	lines := strings.Split(strings.TrimSpace(w.log), "\n")
	return slices.DeleteFunc(lines, func(l string) bool { return !ours.MatchString(l) || announced.MatchString(l) }), err
}

// announced is a link that is up and was not down, said again by the kernel
// whatever became of it: the picture afterwards has the rest.
var announced = regexp.MustCompile(`^[0-9]+: .*,UP,LOWER_UP> `)

// undisturbed does something and wants that nothing of ours changes by it, not
// for a moment, while a connection between pods of the two machines goes on.
func (w *world) undisturbed(ctx context.Context, do func(context.Context) error) (string, error) {
	before, err := picture(ctx, w.m2())
	if err != nil {
		return "", err
	}
	silence, heard, err := w.heard(ctx, do)
	if err != nil {
		return "", err
	}
	if len(heard) > 0 {
		return "", fmt.Errorf("%d changes of what is ours:\n%s", len(heard), strings.Join(heard[:min(len(heard), 40)], "\n"))
	}
	after, err := picture(ctx, w.m2())
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d objects and settings as they were; longest silence of a connection %s",
		strings.Count(before, "\n"), silence), differ(before, after)
}

// heard does something during a transfer between the pods and returns what
// changed of ours meanwhile.
func (w *world) heard(ctx context.Context, do func(context.Context) error) (silence string, changes []string, err error) {
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", nil, err
	}
	to, err := w.PodOn(ctx, "everywhere", "m2")
	if err != nil {
		return "", nil, err
	}
	transfer, err := w.StartTransfer(ctx, from, cluster.Stream(to), "undisturbed", 1<<20)
	if err != nil {
		return "", nil, err
	}
	ears, err := listen(ctx, w.m2())
	if err != nil {
		return "", nil, err
	}
	if err := do(ctx); err != nil {
		return "", nil, err
	}
	if changes, err = ears.end(ctx); err != nil {
		return "", nil, err
	}
	p, err := transfer.Stop(ctx)
	return cluster.Short(p.Silence), changes, err
}

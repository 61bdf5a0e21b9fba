package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"meshd.dev/pkg/reconcile"
)

// nodeCIDR gives every node its own part of the pod ranges, one a family.
// The Node objects are the only record of what is taken: it is read from the
// API itself, not from a cache, before anything is given away, and written
// with the version that was read. So no crash can give one range twice.
type nodeCIDR struct {
	plane    *plane
	nodes    cache.SharedIndexInformer
	recorder record.EventRecorder
	loop     *reconcile.Loop
}

func newNodeCIDR(p *plane) *nodeCIDR {
	c := &nodeCIDR{
		plane:    p,
		nodes:    p.shared.Core().V1().Nodes().Informer(),
		recorder: p.recorder("node-cidr-controller"),
	}
	c.loop = p.loop("nodecidr", c.do)
	watch(c.nodes, c.loop.Kick, func(old, new any) bool {
		return !slices.Equal(old.(*corev1.Node).Spec.PodCIDRs, new.(*corev1.Node).Spec.PodCIDRs)
	})
	return c
}

func (c *nodeCIDR) Run(ctx context.Context) error {
	if len(c.plane.cfg.PodCIDRs) == 0 || !synced(ctx, c.nodes) {
		return nil
	}
	return c.loop.Run(ctx)
}

func (c *nodeCIDR) do(ctx context.Context) error {
	if !slices.ContainsFunc(c.nodes.GetStore().List(), func(o any) bool { return len(o.(*corev1.Node).Spec.PodCIDRs) == 0 }) {
		return clashes(nodesOf(c.nodes.GetStore()))
	}
	list, err := c.plane.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	nodes := make([]*corev1.Node, 0, len(list.Items))
	for i := range list.Items {
		nodes = append(nodes, &list.Items[i])
	}
	ranges := podRanges(c.plane.cfg.PodCIDRs, c.plane.cfg.NodeMaskIPv4, c.plane.cfg.NodeMaskIPv6)
	gifts, errs := assignPodCIDRs(nodes, ranges)
	for _, g := range gifts {
		if err := c.give(ctx, g); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, clashes(nodes))...)
}

// give writes the gift unless the node changed since it was read.
func (c *nodeCIDR) give(ctx context.Context, g gift) error {
	if g.err != nil {
		c.recorder.Event(g.node, corev1.EventTypeWarning, "CIDRNotAvailable", g.err.Error())
		return fmt.Errorf("node %s: %w", g.node.Name, g.err)
	}
	cidrs := make([]string, 0, len(g.cidrs))
	for _, p := range g.cidrs {
		cidrs = append(cidrs, p.String())
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": g.node.UID, "resourceVersion": g.node.ResourceVersion},
		"spec":     map[string]any{"podCIDR": cidrs[0], "podCIDRs": cidrs},
	})
	if err != nil {
		return err
	}
	if _, err := c.plane.client.CoreV1().Nodes().Patch(ctx, g.node.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("give pod CIDRs %v to node %s: %w", cidrs, g.node.Name, err)
	}
	c.plane.cfg.Log.Info("node got its pod CIDRs", "node", g.node.Name, "podCIDRs", cidrs)
	return nil
}

// gift is what one node is to get, or why there is nothing left for it.
type gift struct {
	node  *corev1.Node
	cidrs []netip.Prefix
	err   error
}

// podRange is one family's range and the length of a node's part of it.
type podRange struct {
	all  netip.Prefix
	bits int
}

func podRanges(cidrs []netip.Prefix, mask4, mask6 int) []podRange {
	ranges := make([]podRange, 0, len(cidrs))
	for _, p := range cidrs {
		bits := mask6
		if p.Addr().Is4() {
			bits = mask4
		}
		ranges = append(ranges, podRange{p.Masked(), bits})
	}
	return ranges
}

// maxNodesBits bounds the parts of one range to 65,536, as Kubernetes does.
const maxNodesBits = 16

func validateRanges(cidrs []netip.Prefix, mask4, mask6 int) error {
	var errs []error
	families := map[bool]bool{}
	for _, r := range podRanges(cidrs, mask4, mask6) {
		is4 := r.all.Addr().Is4()
		switch {
		case !r.all.IsValid():
			errs = append(errs, errors.New("pod CIDR: not a prefix, want for instance 10.244.0.0/16"))
		case families[is4]:
			errs = append(errs, fmt.Errorf("pod CIDR %s: second one of its family, want at most one IPv4 and one IPv6", r.all))
		case r.bits < r.all.Bits() || r.bits > r.all.Addr().BitLen()-2:
			errs = append(errs, fmt.Errorf("pod CIDR %s: a /%d a node does not fit, want a length between %d and %d", r.all, r.bits, r.all.Bits(), r.all.Addr().BitLen()-2))
		case r.bits-r.all.Bits() > maxNodesBits:
			errs = append(errs, fmt.Errorf("pod CIDR %s: parts of /%d are more than %d nodes, want a shorter range or larger parts", r.all, r.bits, 1<<maxNodesBits))
		}
		families[is4] = true
	}
	return errors.Join(errs...)
}

// assignPodCIDRs decides what the nodes without pod CIDRs get: for each range
// the lowest part that overlaps none a node has, nodes in order of creation.
// Errors are about nodes whose own CIDRs cannot be read; nothing is given
// away then, because what is taken is not known.
func assignPodCIDRs(nodes []*corev1.Node, ranges []podRange) ([]gift, []error) {
	taken, errs := takenPrefixes(nodes)
	if len(errs) > 0 || len(ranges) == 0 {
		return nil, errs
	}
	var needy []*corev1.Node
	for _, n := range nodes {
		if len(n.Spec.PodCIDRs) == 0 && n.Spec.PodCIDR == "" && n.DeletionTimestamp == nil {
			needy = append(needy, n)
		}
	}
	slices.SortFunc(needy, byCreation)
	allocators := make([]*cutter, 0, len(ranges))
	for _, r := range ranges {
		allocators = append(allocators, newCutter(r, taken))
	}
	gifts := make([]gift, 0, len(needy))
	for _, n := range needy {
		gifts = append(gifts, cutFor(n, allocators))
	}
	return gifts, nil
}

// cutFor takes one part of every range, or none when one is exhausted.
func cutFor(n *corev1.Node, allocators []*cutter) gift {
	g := gift{node: n}
	for _, a := range allocators {
		p, ok := a.peek()
		if !ok {
			return gift{node: n, err: fmt.Errorf("no part of pod CIDR %s is left (%d of /%d in use): delete nodes that are gone or choose a larger range", a.all, a.parts(), a.bits)}
		}
		g.cidrs = append(g.cidrs, p)
	}
	for _, a := range allocators {
		a.next++
	}
	return g
}

// cutter walks over the parts of a range and skips those in use.
type cutter struct {
	podRange
	used map[int]bool
	next int
}

func newCutter(r podRange, taken []netip.Prefix) *cutter {
	c := &cutter{podRange: r, used: map[int]bool{}}
	for _, t := range taken {
		if !t.Overlaps(r.all) {
			continue
		}
		first, last := 0, c.parts()-1
		if t.Bits() > r.all.Bits() {
			first = c.index(t.Addr())
			last = first + max(1, 1<<max(0, r.bits-t.Bits())) - 1
		}
		for i := first; i <= last; i++ {
			c.used[i] = true
		}
	}
	return c
}

func (c *cutter) parts() int { return 1 << (c.bits - c.all.Bits()) }

// peek is the lowest free part from next on.
func (c *cutter) peek() (netip.Prefix, bool) {
	for c.next < c.parts() && c.used[c.next] {
		c.next++
	}
	if c.next >= c.parts() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(c.addr(c.next), c.bits), true
}

// index is the number of the part addr lies in: the bits of the address
// between the length of the range and that of a part.
func (c *cutter) index(addr netip.Addr) int {
	b := addr.AsSlice()
	n := 0
	for i := c.all.Bits(); i < c.bits; i++ {
		n = n<<1 | int(b[i/8]>>(7-i%8))&1
	}
	return n
}

// addr is the first address of part i.
func (c *cutter) addr(n int) netip.Addr {
	b := c.all.Addr().AsSlice()
	for i := c.bits - 1; i >= c.all.Bits(); i-- {
		b[i/8] |= byte(n&1) << (7 - i%8)
		n >>= 1
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// takenPrefixes are the pod CIDRs the nodes have.
func takenPrefixes(nodes []*corev1.Node) ([]netip.Prefix, []error) {
	var taken []netip.Prefix
	var errs []error
	for _, n := range nodes {
		cidrs := n.Spec.PodCIDRs
		if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
			cidrs = []string{n.Spec.PodCIDR}
		}
		for _, s := range cidrs {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				errs = append(errs, fmt.Errorf("node %s: pod CIDR: %w", n.Name, err))
				continue
			}
			taken = append(taken, p.Masked())
		}
	}
	return taken, errs
}

// clashes says which nodes have pod CIDRs that overlap. We never write such,
// but an administrator can.
func clashes(nodes []*corev1.Node) error {
	type owned struct {
		p    netip.Prefix
		node string
	}
	var all []owned
	for _, n := range nodes {
		mine, _ := takenPrefixes([]*corev1.Node{n})
		for _, p := range mine {
			all = append(all, owned{p, n.Name})
		}
	}
	slices.SortFunc(all, func(a, b owned) int { return a.p.Compare(b.p) })
	var errs []error
	for i := 1; i < len(all); i++ {
		if a, b := all[i-1], all[i]; a.p.Overlaps(b.p) {
			errs = append(errs, fmt.Errorf("pod CIDR %s of node %s overlaps %s of node %s: delete one of the nodes and let it join again", a.p, a.node, b.p, b.node))
		}
	}
	return errors.Join(errs...)
}

func byCreation(a, b *corev1.Node) int {
	if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
		return c
	}
	if a.Name < b.Name {
		return -1
	}
	return 1
}

func nodesOf(store cache.Store) []*corev1.Node {
	objs := store.List()
	nodes := make([]*corev1.Node, 0, len(objs))
	for _, o := range objs {
		nodes = append(nodes, o.(*corev1.Node))
	}
	slices.SortFunc(nodes, func(a, b *corev1.Node) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return nodes
}

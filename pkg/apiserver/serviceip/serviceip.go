package serviceip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// Config says what services may get.
type Config struct {
	// CIDRs of the services, at most one a family. The first one's family is
	// the default.
	CIDRs []netip.Prefix
	// NodePorts; zero means 30000-32767.
	NodePorts PortRange
	// Resync is the time between two comparisons with the stored services;
	// zero means 5 minutes, and below a minute makes no sense.
	Resync time.Duration
	Log    *slog.Logger
}

// Allocator gives services their addresses and node ports. See the package
// comment for its wiring and its laws.
type Allocator struct {
	ranges     map[corev1.IPFamily]addrRange
	configured []corev1.IPFamily // default first
	ports      PortRange
	resync     time.Duration
	log        *slog.Logger
	list       func(context.Context) ([]corev1.Service, error)
	kick       chan struct{}

	pool pool
}

// New returns an Allocator that is not attached to a store yet.
func New(cfg Config) (*Allocator, error) {
	if len(cfg.CIDRs) == 0 {
		return nil, errors.New("service CIDRs: want at least one, like 10.96.0.0/16")
	}
	if cfg.NodePorts == (PortRange{}) {
		cfg.NodePorts = PortRange{30000, 32767}
	}
	if cfg.NodePorts.First == 0 || cfg.NodePorts.First > cfg.NodePorts.Last {
		return nil, fmt.Errorf("node port range %s: want FIRST-LAST with 1 <= FIRST <= LAST", cfg.NodePorts)
	}
	if cfg.Resync == 0 {
		cfg.Resync = 5 * time.Minute
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &Allocator{
		ranges: map[corev1.IPFamily]addrRange{},
		ports:  cfg.NodePorts,
		resync: cfg.Resync,
		log:    cfg.Log,
		kick:   make(chan struct{}, 1),
		pool:   pool{held: map[item]*hold{}},
	}
	for _, p := range cfg.CIDRs {
		f := familyOf(p.Addr())
		if _, twice := a.ranges[f]; twice {
			return nil, fmt.Errorf("service CIDR %s: there is another %s one, want at most one a family", p, f)
		}
		r, err := newAddrRange(p)
		if err != nil {
			return nil, err
		}
		a.ranges[f], a.configured = r, append(a.configured, f)
	}
	return a, nil
}

// First is the address of the service default/kubernetes: the first one of the
// default family's range.
func (a *Allocator) First() netip.Addr { return a.ranges[a.configured[0]].kubernetes() }

// undo gives back what allocate held.
type undo func()

// allocate completes svc and holds what it has beyond old (nil on create).
// With dryRun it only completes it.
func (a *Allocator) allocate(ctx context.Context, svc, old *corev1.Service, dryRun bool) (undo, error) {
	invalid := func(errs field.ErrorList) error {
		return apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Service").GroupKind(), svc.Name, errs)
	}
	uid := svc.UID
	var had []item
	if old != nil {
		uid, had = old.UID, holdings(old)
		carryOver(svc, old)
		dropUnneeded(svc, old)
	}
	pairClusterIPs(svc, old)
	if old != nil && !needsClusterIP(old) {
		// From ExternalName: everything about addresses starts afresh.
		old = nil
	}
	errs := families(svc, old, a.configured)
	if errs = append(errs, checkImmutable(svc, old)...); len(errs) > 0 {
		return nil, invalid(errs)
	}

	a.pool.mu.Lock()
	defer a.pool.mu.Unlock()
	if err := a.load(ctx); err != nil {
		return nil, apierrors.NewServiceUnavailable(err.Error())
	}
	c := chooser{a: a, uid: uid, had: had, own: ownsFirst(ctx, svc)}
	if err := c.addresses(svc); err != nil {
		return nil, err
	}
	if err := c.nodePorts(svc); err != nil {
		return nil, err
	}
	if len(c.errs) > 0 {
		return nil, invalid(c.errs)
	}
	if dryRun {
		return func() {}, nil
	}
	added := without(holdings(svc), had)
	a.pool.claim(uid, added)
	return func() {
		a.pool.mu.Lock()
		defer a.pool.mu.Unlock()
		a.pool.drop(uid, added)
	}, nil
}

// ownsFirst reports whether svc is default/kubernetes, the only one that may
// have the first address of a range.
func ownsFirst(ctx context.Context, svc *corev1.Service) bool {
	ns := svc.Namespace
	if ns == "" {
		ns = request.NamespaceValue(ctx)
	}
	return ns == metaDefault && svc.Name == "kubernetes"
}

const metaDefault = "default"

// A chooser fills one service under the lock of the pool. Errors of the user
// gather in errs; running out is returned.
type chooser struct {
	a    *Allocator
	uid  types.UID
	had  []item
	own  bool
	errs field.ErrorList
	took []item // chosen or requested in this call
}

func (c *chooser) free(it item) bool {
	return c.a.pool.freeFor(c.uid, it) && !slices.Contains(c.took, it) && !slices.Contains(c.had, it)
}

// addresses completes spec.clusterIPs, one address for each family.
func (c *chooser) addresses(svc *corev1.Service) error {
	spec := &svc.Spec
	if !needsClusterIP(svc) || isHeadless(svc) {
		return nil
	}
	for i, f := range spec.IPFamilies {
		if i < len(spec.ClusterIPs) {
			if err := c.requested(f, spec.ClusterIPs[i]); err != nil {
				c.errs = append(c.errs, field.Invalid(specPath.Child("clusterIPs").Index(i), spec.ClusterIPs[i], err.Error()))
			}
			continue
		}
		r, ok := c.a.ranges[f]
		if !ok { // an untouched PreferDualStack service of another time
			continue
		}
		addr, err := r.pick(c.free)
		if err != nil {
			return apierrors.NewServiceUnavailable(fmt.Sprintf("allocate a cluster IP for service %s: %v", svc.Name, err))
		}
		spec.ClusterIPs = append(spec.ClusterIPs, addr.String())
		c.took = append(c.took, item{addr: addr})
	}
	if len(spec.ClusterIPs) > 0 {
		spec.ClusterIP = spec.ClusterIPs[0]
	}
	return nil
}

func (c *chooser) requested(f corev1.IPFamily, s string) error {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return errors.New("must be an IP address, like 10.96.0.20, or 'None'")
	}
	it := item{addr: addr}
	if slices.Contains(c.had, it) {
		return nil // also when the range was changed since
	}
	r := c.a.ranges[f]
	if err := r.check(addr); err != nil {
		return fmt.Errorf("failed to allocate IP %s: %w", addr, err)
	}
	if addr == r.kubernetes() && !c.own {
		return fmt.Errorf("failed to allocate IP %s: %w", addr, errReserved)
	}
	if !c.free(it) {
		return fmt.Errorf("failed to allocate IP %s: provided IP is %w", addr, errTaken)
	}
	c.took = append(c.took, it)
	return nil
}

// nodePorts completes the node ports and the health check node port.
func (c *chooser) nodePorts(svc *corev1.Service) error {
	if !needsNodePort(svc) {
		return nil
	}
	for i := range svc.Spec.Ports {
		if p := &svc.Spec.Ports[i]; p.NodePort != 0 {
			c.requestedPort(specPath.Child("ports").Index(i).Child("nodePort"), p.NodePort)
		}
	}
	c.errs = append(c.errs, duplicateNodePorts(svc)...)
	if allocatesNodePorts(svc) {
		for i := range svc.Spec.Ports {
			if err := c.fillPort(svc, i); err != nil {
				return err
			}
		}
	}
	if !needsHealthCheckPort(svc) {
		return nil
	}
	if p := svc.Spec.HealthCheckNodePort; p != 0 {
		if slices.ContainsFunc(svc.Spec.Ports, func(sp corev1.ServicePort) bool { return sp.NodePort == p }) {
			c.errs = append(c.errs, field.Invalid(specPath.Child("healthCheckNodePort"), p, "must not be a node port of the same service"))
			return nil
		}
		c.requestedPort(specPath.Child("healthCheckNodePort"), p)
		return nil
	}
	port, err := c.pickPort(svc)
	svc.Spec.HealthCheckNodePort = int32(port)
	return err
}

func (c *chooser) requestedPort(path *field.Path, port int32) {
	it := item{port: uint16(port)}
	switch {
	case port > 0 && port <= 65535 && slices.Contains(c.had, it):
	case slices.Contains(c.took, it): // shared by two protocols; duplicateNodePorts judges
	case !c.a.ports.contains(port):
		c.errs = append(c.errs, field.Invalid(path, port, fmt.Sprintf("provided port is not in the valid range. The range of valid ports is %s", c.a.ports)))
	case !c.free(it):
		c.errs = append(c.errs, field.Invalid(path, port, "provided port is "+errTaken.Error()))
	default:
		c.took = append(c.took, it)
	}
}

// fillPort gives port i a node port: the one its twin of another protocol has,
// else a free one.
func (c *chooser) fillPort(svc *corev1.Service, i int) error {
	p := &svc.Spec.Ports[i]
	if p.NodePort != 0 {
		return nil
	}
	for j, twin := range svc.Spec.Ports {
		if j != i && twin.NodePort != 0 && twin.Port == p.Port && keyOf(twin) != keyOf(*p) && !usesNodePort(svc, keyOf(*p).protocol, twin.NodePort) {
			p.NodePort = twin.NodePort
			return nil
		}
	}
	port, err := c.pickPort(svc)
	p.NodePort = int32(port)
	return err
}

func (c *chooser) pickPort(svc *corev1.Service) (uint16, error) {
	port, err := c.a.ports.pick(c.free)
	if err != nil {
		return 0, apierrors.NewServiceUnavailable(fmt.Sprintf("allocate a node port for service %s: %v", svc.Name, err))
	}
	c.took = append(c.took, item{port: port})
	return port, nil
}

func usesNodePort(svc *corev1.Service, proto corev1.Protocol, nodePort int32) bool {
	return slices.ContainsFunc(svc.Spec.Ports, func(p corev1.ServicePort) bool {
		return p.NodePort == nodePort && keyOf(p).protocol == proto
	})
}

func duplicateNodePorts(svc *corev1.Service) field.ErrorList {
	var errs field.ErrorList
	type use struct {
		corev1.Protocol
		port int32
	}
	seen := map[use]bool{}
	for i, p := range svc.Spec.Ports {
		u := use{keyOf(p).protocol, p.NodePort}
		if p.NodePort != 0 && seen[u] {
			errs = append(errs, field.Duplicate(specPath.Child("ports").Index(i).Child("nodePort"), p.NodePort))
		}
		seen[u] = true
	}
	return errs
}

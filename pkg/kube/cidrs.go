package kube

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/cache"

	"meshd.dev/pkg/mesh"
)

const (
	// askAgain is how soon the API is asked once more what it serves.
	askAgain = 5 * time.Second
	// cidrsPatience is how long the first State waits for these ranges: one
	// with guessed ones in their place may be taken for sound and is not.
	cidrsPatience = 2 * time.Second
)

// watchServiceCIDRs until ctx ends, where the API serves such objects. An API
// that does not say is asked until it does. known is called when there is
// nothing to wait for any more.
func (w *Window) watchServiceCIDRs(ctx context.Context, known func()) {
	defer known()
	for warned := false; ; warned = true {
		served, err := w.servesServiceCIDRs()
		if err == nil && served {
			break
		}
		if err == nil {
			return
		}
		if !warned {
			known()
			w.cfg.Log.Warn("ranges of service addresses are taken from the services there are, until the API says what it serves", "err", err)
		}
		if !pause(ctx, askAgain) {
			return
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if cache.WaitForCacheSync(ctx.Done(), w.cidrs.HasSynced) {
			known()
		}
	}()
	w.cidrs.RunWithContext(ctx)
	<-done
}

func (w *Window) servesServiceCIDRs() (bool, error) {
	list, err := w.cfg.Client.Discovery().ServerResourcesForGroupVersion(networkingv1.SchemeGroupVersion.String())
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, r := range list.APIResources {
		if r.Name == "servicecidrs" {
			return true, nil
		}
	}
	return false, nil
}

// serviceCIDRs are those the cluster names. Where it names none, or may not be
// asked, they are the smallest ranges around the service addresses of each
// family.
func (w *Window) serviceCIDRs(services []*mesh.Service) []netip.Prefix {
	if !w.cfg.ServiceCIDRs {
		return nil
	}
	var named []netip.Prefix
	if w.cidrs != nil {
		for _, obj := range w.cidrs.GetStore().List() {
			for _, text := range obj.(*networkingv1.ServiceCIDR).Spec.CIDRs {
				if p, err := netip.ParsePrefix(text); err == nil { // the API validates them
					named = append(named, p.Masked())
				}
			}
		}
	}
	if len(named) == 0 {
		named = around(services)
	}
	slices.SortFunc(named, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return slices.Compact(named)
}

// Service ranges are not wider than this in any cluster: the API server
// refuses them.
const (
	widestIPv4 = 12
	widestIPv6 = 64
)

// around is the smallest prefix a family with all cluster addresses in it, if
// that is one a service range can have.
func around(services []*mesh.Service) []netip.Prefix {
	var ps []netip.Prefix
	for _, is4 := range []bool{true, false} {
		var p netip.Prefix
		for _, s := range services {
			for _, a := range s.ClusterIPs {
				if a.Is4() == is4 {
					p = widened(p, a)
				}
			}
		}
		if p.IsValid() && (is4 && p.Bits() >= widestIPv4 || !is4 && p.Bits() >= widestIPv6) {
			ps = append(ps, p)
		}
	}
	return ps
}

func widened(p netip.Prefix, a netip.Addr) netip.Prefix {
	if !p.IsValid() {
		return netip.PrefixFrom(a, a.BitLen())
	}
	for !p.Contains(a) {
		p = netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked()
	}
	return p
}

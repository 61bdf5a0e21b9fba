package serviceip

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

var specPath = field.NewPath("spec")

// families decides spec.ipFamilies and spec.ipFamilyPolicy of a service from
// what the client said, what was stored before (old, nil on create) and which
// families the cluster has (configured, default first).
//
// Rules, as in KEP-563: a service without policy is SingleStack in the default
// family; headless without selector may span both families whatever the
// cluster has; requested addresses decide the order of families; a second
// family appears only by policy and disappears only by policy SingleStack.
func families(svc, old *corev1.Service, configured []corev1.IPFamily) field.ErrorList {
	if !needsClusterIP(svc) || untouchedPreferDual(svc, old) {
		return nil
	}
	spec := &svc.Spec
	loose := isHeadless(svc) && len(spec.Selector) == 0
	if spec.IPFamilyPolicy == nil {
		spec.IPFamilyPolicy = new(defaultPolicy(old, loose))
	}
	if errs := checkShape(svc); len(errs) > 0 {
		return errs
	}
	if old != nil {
		if errs := reduce(svc, old); len(errs) > 0 {
			return errs
		}
	}
	if errs := inferFamilies(svc, configured, loose); len(errs) > 0 {
		return errs
	}
	dual := *spec.IPFamilyPolicy != corev1.IPFamilyPolicySingleStack
	if len(spec.IPFamilies) == 0 {
		spec.IPFamilies = []corev1.IPFamily{configured[0]}
	}
	if dual && len(spec.IPFamilies) == 1 && (loose || len(configured) == 2) {
		spec.IPFamilies = append(spec.IPFamilies, otherFamily(spec.IPFamilies[0]))
	}
	return nil
}

func defaultPolicy(old *corev1.Service, loose bool) corev1.IPFamilyPolicy {
	switch {
	case old != nil && old.Spec.IPFamilyPolicy != nil:
		return *old.Spec.IPFamilyPolicy
	case loose:
		return corev1.IPFamilyPolicyRequireDualStack
	}
	return corev1.IPFamilyPolicySingleStack
}

// untouchedPreferDual is true for an update that leaves a PreferDualStack
// service alone: it neither gains nor loses a family because the cluster did.
func untouchedPreferDual(svc, old *corev1.Service) bool {
	prefer := corev1.IPFamilyPolicyPreferDualStack
	return old != nil && svc.Spec.Type == old.Spec.Type &&
		equalPtr(svc.Spec.IPFamilyPolicy, &prefer) && equalPtr(old.Spec.IPFamilyPolicy, &prefer) &&
		slices.Equal(svc.Spec.ClusterIPs, old.Spec.ClusterIPs) &&
		slices.Equal(svc.Spec.IPFamilies, old.Spec.IPFamilies)
}

// checkShape refuses what no cluster could serve.
func checkShape(svc *corev1.Service) field.ErrorList {
	var errs field.ErrorList
	spec, ips := &svc.Spec, specPath.Child("clusterIPs")
	switch p := *spec.IPFamilyPolicy; p {
	case corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack:
	default:
		errs = append(errs, field.NotSupported(specPath.Child("ipFamilyPolicy"), p, []corev1.IPFamilyPolicy{
			corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack}))
	}
	if len(spec.ClusterIPs) > 2 {
		errs = append(errs, field.Invalid(ips, spec.ClusterIPs, "may hold at most 2 values"))
	}
	if len(spec.IPFamilies) > 2 {
		errs = append(errs, field.Invalid(specPath.Child("ipFamilies"), spec.IPFamilies, "may hold at most 2 values"))
	}
	for i, f := range spec.IPFamilies {
		if f != corev1.IPv4Protocol && f != corev1.IPv6Protocol {
			errs = append(errs, field.NotSupported(specPath.Child("ipFamilies").Index(i), f, []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}))
		} else if slices.Index(spec.IPFamilies, f) < i {
			errs = append(errs, field.Duplicate(specPath.Child("ipFamilies").Index(i), f))
		}
	}
	if len(spec.ClusterIPs) > 0 && spec.ClusterIP != spec.ClusterIPs[0] {
		errs = append(errs, field.Invalid(specPath.Child("clusterIP"), spec.ClusterIP, "must be the first value of clusterIPs"))
	}
	var seen []corev1.IPFamily
	for i, s := range spec.ClusterIPs {
		if s == corev1.ClusterIPNone {
			if len(spec.ClusterIPs) > 1 {
				errs = append(errs, field.Invalid(ips, spec.ClusterIPs, "'None' must be the only value"))
			}
			continue
		}
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			errs = append(errs, field.Invalid(ips.Index(i), s, "must be an IP address, like 10.96.0.20, or 'None'"))
			continue
		}
		f := familyOf(a)
		if slices.Contains(seen, f) {
			errs = append(errs, field.Invalid(ips, spec.ClusterIPs, "two addresses must be one of each family"))
		}
		seen = append(seen, f)
		if i < len(spec.IPFamilies) && spec.IPFamilies[i] != f {
			errs = append(errs, field.Invalid(ips.Index(i), s, fmt.Sprintf("must be an %s address, as ipFamilies[%d] says", spec.IPFamilies[i], i)))
		}
	}
	return errs
}

// reduce handles an update to fewer families.
func reduce(svc, old *corev1.Service) field.ErrorList {
	spec := &svc.Spec
	if *spec.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack {
		// The policy alone says it; the first address and family stay.
		if len(spec.ClusterIPs) > 1 && slices.Equal(spec.ClusterIPs, old.Spec.ClusterIPs) {
			spec.ClusterIPs = spec.ClusterIPs[:1]
		}
		if len(spec.IPFamilies) > 1 && slices.Equal(spec.IPFamilies, old.Spec.IPFamilies) {
			spec.IPFamilies = spec.IPFamilies[:1]
		}
		return nil
	}
	var errs field.ErrorList
	policy := specPath.Child("ipFamilyPolicy")
	if n := len(spec.ClusterIPs); n > 0 && n < len(old.Spec.ClusterIPs) {
		errs = append(errs, field.Invalid(policy, *spec.IPFamilyPolicy, "must be 'SingleStack' to release the secondary cluster IP"))
	}
	if n := len(spec.IPFamilies); n > 0 && n < len(old.Spec.IPFamilies) {
		errs = append(errs, field.Invalid(policy, *spec.IPFamilyPolicy, "must be 'SingleStack' to release the secondary IP family"))
	}
	return errs
}

// inferFamilies takes families from requested addresses and holds what was
// asked for against what the cluster has.
func inferFamilies(svc *corev1.Service, configured []corev1.IPFamily, loose bool) field.ErrorList {
	var errs field.ErrorList
	spec, policy := &svc.Spec, specPath.Child("ipFamilyPolicy")
	if *spec.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack {
		if len(spec.ClusterIPs) == 2 {
			errs = append(errs, field.Invalid(policy, *spec.IPFamilyPolicy, "must be 'RequireDualStack' or 'PreferDualStack' when multiple cluster IPs are specified"))
		}
		if len(spec.IPFamilies) == 2 {
			errs = append(errs, field.Invalid(policy, *spec.IPFamilyPolicy, "must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified"))
		}
	}
	for i, s := range spec.ClusterIPs {
		a, err := netip.ParseAddr(s)
		if err != nil || i < len(spec.IPFamilies) {
			continue
		}
		f := familyOf(a)
		if !slices.Contains(configured, f) {
			errs = append(errs, field.Invalid(specPath.Child("clusterIPs").Index(i), s, fmt.Sprintf("%s is not configured on this cluster", f)))
			continue
		}
		if slices.Contains(spec.IPFamilies, f) {
			errs = append(errs, field.Invalid(specPath.Child("clusterIPs").Index(i), s, fmt.Sprintf("must not be another %s address", f)))
			continue
		}
		spec.IPFamilies = append(spec.IPFamilies, f)
	}
	if loose || len(errs) > 0 {
		return errs
	}
	if *spec.IPFamilyPolicy == corev1.IPFamilyPolicyRequireDualStack && len(configured) < 2 {
		errs = append(errs, field.Invalid(policy, *spec.IPFamilyPolicy, "this cluster is not configured for dual-stack services"))
	}
	for i, f := range spec.IPFamilies {
		if !slices.Contains(configured, f) {
			errs = append(errs, field.Invalid(specPath.Child("ipFamilies").Index(i), f, "not configured on this cluster"))
		}
	}
	return errs
}

// checkImmutable refuses to move a service to another first address or family.
func checkImmutable(svc, old *corev1.Service) field.ErrorList {
	if old == nil || !needsClusterIP(old) || !needsClusterIP(svc) {
		return nil
	}
	var errs field.ErrorList
	was, is := clusterIPs(old), clusterIPs(svc)
	if len(was) > 0 && (len(is) == 0 || is[0] != was[0]) {
		errs = append(errs, field.Invalid(specPath.Child("clusterIPs").Index(0), is, fmt.Sprintf("may not change once set, it is %s", was[0])))
	}
	if len(was) > 1 && len(is) > 1 && is[1] != was[1] {
		errs = append(errs, field.Invalid(specPath.Child("clusterIPs").Index(1), is[1], fmt.Sprintf("may not change, it is %s; release it first with ipFamilyPolicy 'SingleStack'", was[1])))
	}
	wasF, isF := old.Spec.IPFamilies, svc.Spec.IPFamilies
	if len(wasF) > 0 && (len(isF) == 0 || isF[0] != wasF[0]) {
		errs = append(errs, field.Invalid(specPath.Child("ipFamilies").Index(0), isF, fmt.Sprintf("may not change once set, it is %s", wasF[0])))
	}
	return errs
}

package schedule

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// term is an affinity term of the pod called owner, ready to match others.
type term struct {
	key        string
	selector   labels.Selector
	namespaces []string
	nsSelector labels.Selector
	all        map[string]labels.Set
}

func (c *Cluster) term(owner *corev1.Pod, t corev1.PodAffinityTerm) (term, error) {
	sel, err := metav1.LabelSelectorAsSelector(t.LabelSelector)
	if err != nil {
		return term{}, fmt.Errorf("pod affinity term on %s: %w", t.TopologyKey, err)
	}
	ns, err := metav1.LabelSelectorAsSelector(t.NamespaceSelector)
	if err != nil {
		return term{}, fmt.Errorf("pod affinity term on %s: namespace selector: %w", t.TopologyKey, err)
	}
	out := term{key: t.TopologyKey, selector: sel, namespaces: t.Namespaces, nsSelector: ns, all: c.namespaces}
	if len(t.Namespaces) == 0 && t.NamespaceSelector == nil {
		out.namespaces = []string{owner.Namespace}
	}
	return out, nil
}

func (c *Cluster) terms(owner *corev1.Pod, ts []corev1.PodAffinityTerm) ([]term, error) {
	out := make([]term, 0, len(ts))
	for _, t := range ts {
		parsed, err := c.term(owner, t)
		if err != nil {
			return nil, err
		}
		out = append(out, parsed)
	}
	return out, nil
}

func (t term) matches(p *corev1.Pod) bool {
	if !slices.Contains(t.namespaces, p.Namespace) && !t.nsSelector.Matches(t.all[p.Namespace]) {
		return false
	}
	return t.selector.Matches(labels.Set(p.Labels))
}

// domain is one value of a topology key.
type domain struct{ key, value string }

func affinityTerms(pod *corev1.Pod) []corev1.PodAffinityTerm {
	if a := pod.Spec.Affinity; a != nil && a.PodAffinity != nil {
		return a.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	}
	return nil
}

func antiAffinityTerms(pod *corev1.Pod) []corev1.PodAffinityTerm {
	if a := pod.Spec.Affinity; a != nil && a.PodAntiAffinity != nil {
		return a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	}
	return nil
}

// affinityFilter holds the required affinity and anti-affinity of pod, and
// the anti-affinity of those already there against it.
func (c *Cluster) affinityFilter(pod *corev1.Pod) (filter, error) {
	near, err := c.terms(pod, affinityTerms(pod))
	if err != nil {
		return nil, err
	}
	far, err := c.terms(pod, antiAffinityTerms(pod))
	if err != nil {
		return nil, err
	}
	forbidden, err := c.forbidden(pod)
	if err != nil {
		return nil, err
	}
	// To be near somebody means somebody who matches every term.
	nearDomains := c.domains(near, func(p *corev1.Pod, _ term) bool {
		return !slices.ContainsFunc(near, func(t term) bool { return !t.matches(p) })
	})
	farDomains := c.domains(far, func(p *corev1.Pod, t term) bool { return t.matches(p) })
	// The first of a group that wants to be near its own kind may go anywhere.
	first := len(near) > 0 && len(nearDomains) == 0
	for _, t := range near {
		first = first && t.matches(pod)
	}
	return func(h *host) []string {
		for _, t := range near {
			value, ok := h.Labels[t.key]
			if !ok || !first && !nearDomains[domain{t.key, value}] {
				return []string{reasonPodAffinity}
			}
		}
		for _, t := range far {
			if value, ok := h.Labels[t.key]; ok && farDomains[domain{t.key, value}] {
				return []string{reasonPodAnti}
			}
		}
		for d := range forbidden {
			if value, ok := h.Labels[d.key]; ok && value == d.value {
				return []string{reasonExistingAnti}
			}
		}
		return nil
	}, nil
}

// domains are where a pod is that counts for one of the terms, as matched
// says, by the key of that term.
func (c *Cluster) domains(terms []term, matched func(*corev1.Pod, term) bool) map[domain]bool {
	found := map[domain]bool{}
	if len(terms) == 0 {
		return found
	}
	for _, h := range c.nodes {
		for _, p := range h.pods {
			for _, t := range terms {
				if value, ok := h.Labels[t.key]; ok && matched(p, t) {
					found[domain{t.key, value}] = true
				}
			}
		}
	}
	return found
}

// forbidden are the domains pods already placed keep pod out of.
func (c *Cluster) forbidden(pod *corev1.Pod) (map[domain]bool, error) {
	out := map[domain]bool{}
	for _, g := range c.guarded {
		terms, err := c.terms(g.pod, antiAffinityTerms(g.pod))
		if err != nil {
			continue // such a pod was placed by somebody else; it guards nothing
		}
		for _, t := range terms {
			if value, ok := g.node.Labels[t.key]; ok && t.matches(pod) {
				out[domain{t.key, value}] = true
			}
		}
	}
	return out, nil
}

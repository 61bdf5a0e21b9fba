package schedule

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// constraint is a topology spread constraint with what it counts: how many
// matching pods each value of the topology key has among the nodes that count.
type constraint struct {
	corev1.TopologySpreadConstraint
	selector labels.Selector
	counts   map[string]int
	self     int
}

// constraints of pod with this answer to a violation, counted.
func (c *Cluster) constraints(pod *corev1.Pod, when corev1.UnsatisfiableConstraintAction) ([]*constraint, error) {
	var cs []*constraint
	for _, t := range pod.Spec.TopologySpreadConstraints {
		if t.WhenUnsatisfiable != when {
			continue
		}
		sel, err := spreadSelector(pod, t)
		if err != nil {
			return nil, fmt.Errorf("topology spread constraint on %s: %w", t.TopologyKey, err)
		}
		con := &constraint{TopologySpreadConstraint: t, selector: sel, counts: map[string]int{}}
		if sel.Matches(labels.Set(pod.Labels)) {
			con.self = 1
		}
		cs = append(cs, con)
	}
	for _, con := range cs {
		c.count(pod, con, cs)
	}
	return cs, nil
}

// count fills in con.counts. Only nodes that have every key count, and unless
// told otherwise only those the pod's node affinity allows.
func (c *Cluster) count(pod *corev1.Pod, con *constraint, all []*constraint) {
	affinity := nodeaffinity.GetRequiredNodeAffinity(pod)
	taints := taintFilter(pod)
	for _, h := range c.nodes {
		if !hasKeys(h, all) {
			continue
		}
		if con.NodeAffinityPolicy == nil || *con.NodeAffinityPolicy == corev1.NodeInclusionPolicyHonor {
			if ok, err := affinity.Match(h.Node); err != nil || !ok {
				continue
			}
		}
		if con.NodeTaintsPolicy != nil && *con.NodeTaintsPolicy == corev1.NodeInclusionPolicyHonor && taints(h) != nil {
			continue
		}
		value := h.Labels[con.TopologyKey]
		con.counts[value] += 0
		for _, p := range h.pods {
			if p.Namespace == pod.Namespace && p.DeletionTimestamp == nil && con.selector.Matches(labels.Set(p.Labels)) {
				con.counts[value]++
			}
		}
	}
}

func hasKeys(h *host, cs []*constraint) bool {
	for _, con := range cs {
		if _, ok := h.Labels[con.TopologyKey]; !ok {
			return false
		}
	}
	return true
}

// least is the smallest count of a domain; zero while there are fewer domains
// than the constraint asks for.
func (con *constraint) least() int {
	if con.MinDomains != nil && len(con.counts) < int(*con.MinDomains) {
		return 0
	}
	least, first := 0, true
	for _, n := range con.counts {
		if first || n < least {
			least, first = n, false
		}
	}
	return least
}

func spreadSelector(pod *corev1.Pod, t corev1.TopologySpreadConstraint) (labels.Selector, error) {
	sel, err := metav1.LabelSelectorAsSelector(t.LabelSelector)
	if err != nil {
		return nil, err
	}
	for _, key := range t.MatchLabelKeys {
		if value, ok := pod.Labels[key]; ok {
			req, err := labels.NewRequirement(key, "=", []string{value})
			if err != nil {
				return nil, err
			}
			sel = sel.Add(*req)
		}
	}
	return sel, nil
}

func (c *Cluster) spreadFilter(pod *corev1.Pod) (filter, error) {
	cs, err := c.constraints(pod, corev1.DoNotSchedule)
	if err != nil {
		return nil, err
	}
	return func(h *host) []string {
		for _, con := range cs {
			value, ok := h.Labels[con.TopologyKey]
			if !ok {
				return []string{reasonSpreadLabel}
			}
			if con.counts[value]+con.self-con.least() > int(con.MaxSkew) {
				return []string{reasonSpread}
			}
		}
		return nil
	}, nil
}

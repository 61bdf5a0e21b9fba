package schedule

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// Weights of the scores, each 0 to 100 before. Spreading the pods of one
// owner outweighs how full a node is, so that losing a node never loses two
// replicas where it could have lost one.
const (
	weightOwner    = 3
	weightTaint    = 3
	weightAffinity = 2
	weightTopology = 2
	weightFree     = 1
)

// score of each node for pod; more is better.
func (c *Cluster) score(pod *corev1.Pod, nodes []*host) []float64 {
	total := make([]float64, len(nodes))
	add := func(weight float64, points []float64) {
		for i, p := range points {
			total[i] += weight * p
		}
	}
	add(weightOwner, stretch(nodes, ownerPoints(pod)))
	add(weightTaint, stretch(nodes, taintPoints(pod)))
	add(weightAffinity, stretch(nodes, nodePreference(pod)))
	add(weightAffinity, stretch(nodes, c.podPreference(pod)))
	add(weightTopology, stretch(nodes, c.spreadPreference(pod)))
	add(weightFree, each(nodes, freePoints(pod)))
	return total
}

func each(nodes []*host, points func(*host) float64) []float64 {
	out := make([]float64, len(nodes))
	for i, h := range nodes {
		out[i] = points(h)
	}
	return out
}

// stretch maps points so that the worst node has 0 and the best 100; where
// all are equal nobody gets any.
func stretch(nodes []*host, points func(*host) float64) []float64 {
	out := each(nodes, points)
	low, high := out[0], out[0]
	for _, p := range out {
		low, high = min(low, p), max(high, p)
	}
	for i := range out {
		if high == low {
			out[i] = 0
		} else {
			out[i] = 100 * (out[i] - low) / (high - low)
		}
	}
	return out
}

// ownerPoints prefer nodes with few pods of the same controller.
func ownerPoints(pod *corev1.Pod) func(*host) float64 {
	uid := ownerOf(pod)
	return func(h *host) float64 {
		if uid == "" {
			return 0
		}
		return -float64(h.owners[uid])
	}
}

func taintPoints(pod *corev1.Pod) func(*host) float64 {
	return func(h *host) float64 {
		n := 0.0
		for _, t := range h.taints {
			if t.Effect == corev1.TaintEffectPreferNoSchedule && !tolerates(pod, t) {
				n--
			}
		}
		return n
	}
}

func nodePreference(pod *corev1.Pod) func(*host) float64 {
	none := func(*host) float64 { return 0 }
	a := pod.Spec.Affinity
	if a == nil || a.NodeAffinity == nil {
		return none
	}
	terms, err := nodeaffinity.NewPreferredSchedulingTerms(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution)
	if err != nil {
		return none // a wish nobody can read is no reason not to run
	}
	return func(h *host) float64 { return float64(terms.Score(h.Node)) }
}

// podPreference counts the weights of the preferred affinity terms of pod.
func (c *Cluster) podPreference(pod *corev1.Pod) func(*host) float64 {
	points := map[domain]float64{}
	for _, w := range weightedTerms(pod) {
		t, err := c.term(pod, w.PodAffinityTerm)
		if err != nil {
			continue
		}
		for d, n := range c.matchesBy(t) {
			points[d] += float64(w.Weight) * float64(n)
		}
	}
	return func(h *host) float64 {
		sum := 0.0
		for d, p := range points {
			if value, ok := h.Labels[d.key]; ok && value == d.value {
				sum += p
			}
		}
		return sum
	}
}

// weightedTerms of pod; the weights of anti-affinity are negative.
func weightedTerms(pod *corev1.Pod) []corev1.WeightedPodAffinityTerm {
	var out []corev1.WeightedPodAffinityTerm
	a := pod.Spec.Affinity
	if a == nil {
		return nil
	}
	if a.PodAffinity != nil {
		out = append(out, a.PodAffinity.PreferredDuringSchedulingIgnoredDuringExecution...)
	}
	if a.PodAntiAffinity != nil {
		for _, w := range a.PodAntiAffinity.PreferredDuringSchedulingIgnoredDuringExecution {
			w.Weight = -w.Weight
			out = append(out, w)
		}
	}
	return out
}

func (c *Cluster) matchesBy(t term) map[domain]int {
	out := map[domain]int{}
	for _, h := range c.nodes {
		value, ok := h.Labels[t.key]
		if !ok {
			continue
		}
		for _, p := range h.pods {
			if t.matches(p) {
				out[domain{t.key, value}]++
			}
		}
	}
	return out
}

func (c *Cluster) spreadPreference(pod *corev1.Pod) func(*host) float64 {
	cs, err := c.constraints(pod, corev1.ScheduleAnyway)
	if err != nil {
		return func(*host) float64 { return 0 }
	}
	return func(h *host) float64 {
		sum := 0.0
		for _, con := range cs {
			sum -= float64(con.counts[h.Labels[con.TopologyKey]])
		}
		return sum
	}
}

// freePoints is the mean of the free shares of CPU and memory, in percent.
func freePoints(pod *corev1.Pod) func(*host) float64 {
	want := guessed(pod)
	return func(h *host) float64 {
		have := toAmounts(h.Status.Allocatable)
		sum := 0.0
		for _, r := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			if have[r] > 0 {
				sum += max(0, 100*float64(have[r]-h.guess[r]-want[r])/float64(have[r]))
			}
		}
		return sum / 2
	}
}

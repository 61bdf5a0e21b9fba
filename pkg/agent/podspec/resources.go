package podspec

import (
	"cmp"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"

	v1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// Hash of what of a container's spec may change while it runs and makes a new
// one necessary.
func Hash(c *v1.Container) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(c.Name + "\x00" + c.Image))
	return strconv.FormatUint(h.Sum64(), 16)
}

// QOS is the pod's quality of service class.
func QOS(pod *v1.Pod) v1.PodQOSClass {
	any, guaranteed := false, true
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for _, c := range list {
			for _, name := range []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory} {
				limit, limited := c.Resources.Limits[name]
				request, requested := c.Resources.Requests[name]
				any = any || limited && !limit.IsZero() || requested && !request.IsZero()
				if !limited || limit.IsZero() || requested && request.Cmp(limit) != 0 {
					guaranteed = false
				}
			}
		}
	}
	switch {
	case !any:
		return v1.PodQOSBestEffort
	case guaranteed:
		return v1.PodQOSGuaranteed
	default:
		return v1.PodQOSBurstable
	}
}

const cpuPeriod = 100_000 // microseconds

func linuxResources(pod *v1.Pod, c *v1.Container, memory int64, oomFloor int64) *cri.LinuxContainerResources {
	r := &cri.LinuxContainerResources{OomScoreAdj: max(oomFloor, oomScoreAdj(pod, c, memory))}
	cpu, ok := c.Resources.Requests[v1.ResourceCPU]
	limit, limited := c.Resources.Limits[v1.ResourceCPU]
	if !ok && limited {
		cpu = limit
	}
	r.CpuShares = min(max(2, cpu.MilliValue()*1024/1000), 262144)
	if limited && !limit.IsZero() {
		r.CpuPeriod = cpuPeriod
		r.CpuQuota = max(1000, limit.MilliValue()*cpuPeriod/1000)
	}
	if m, ok := c.Resources.Limits[v1.ResourceMemory]; ok {
		r.MemoryLimitInBytes = m.Value()
	}
	return r
}

// oomScoreAdj orders who dies first when memory is short: best effort before
// burstable, in which the bigger a request the safer, before guaranteed.
func oomScoreAdj(pod *v1.Pod, c *v1.Container, memory int64) int64 {
	switch QOS(pod) {
	case v1.PodQOSGuaranteed:
		return -997
	case v1.PodQOSBestEffort:
		return 1000
	}
	if memory <= 0 {
		return 999
	}
	request := c.Resources.Requests.Memory().Value()
	return min(max(1000-1000*request/memory, 3), 999)
}

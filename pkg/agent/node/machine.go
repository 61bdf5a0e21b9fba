package node

import (
	"bytes"
	"context"
	"fmt"
	"os"
	goruntime "runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// KubeletVersion is what the node calls itself: the release whose API it
// serves, for tools compare it.
const KubeletVersion = "v1.37.2-meshd"

// The marks below which the node says that it is short of something.
const (
	lowMemory      = 100 << 20
	lowDiskBytes   = 1 << 30
	lowDiskPercent = 5
	reservedMemory = 100 << 20
)

func firstLine(b []byte) string {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	return string(bytes.TrimSpace(line))
}

func nodeInfo(runtimeVersion string) v1.NodeSystemInfo {
	var u unix.Utsname
	_ = unix.Uname(&u)
	return v1.NodeSystemInfo{
		MachineID:               readLine("/etc/machine-id"),
		SystemUUID:              readLine("/sys/class/dmi/id/product_uuid"),
		BootID:                  readLine("/proc/sys/kernel/random/boot_id"),
		KernelVersion:           unix.ByteSliceToString(u.Release[:]),
		OSImage:                 osImage(),
		ContainerRuntimeVersion: runtimeVersion,
		KubeletVersion:          KubeletVersion,
		OperatingSystem:         goruntime.GOOS,
		Architecture:            goruntime.GOARCH,
	}
}

func osImage() string {
	b, _ := os.ReadFile("/etc/os-release")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return "Linux"
}

// meminfo is a line of /proc/meminfo in bytes.
func meminfo(name string) int64 {
	b, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) >= 2 && fields[0] == name+":" {
			kb, _ := strconv.ParseInt(fields[1], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// Memory of the machine in bytes.
func Memory() int64 { return meminfo("MemTotal") }

// capSysResource is the bit of CAP_SYS_RESOURCE.
const capSysResource = 24

// OOMFloor is the lowest oom_score_adj that may be given to containers: a
// machine that lacks the capability (a container, for instance) may not go
// below its own.
func OOMFloor() int64 {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			if err == nil && caps&(1<<capSysResource) != 0 {
				return -1000
			}
		}
	}
	own, _ := strconv.ParseInt(readLine("/proc/self/oom_score_adj"), 10, 64)
	return own
}

func resources(dir string, pods int) (capacity, allocatable v1.ResourceList) {
	capacity = v1.ResourceList{
		v1.ResourceCPU:    *resource.NewQuantity(int64(goruntime.NumCPU()), resource.DecimalSI),
		v1.ResourceMemory: *resource.NewQuantity(Memory(), resource.BinarySI),
		v1.ResourcePods:   *resource.NewQuantity(int64(pods), resource.DecimalSI),
	}
	if total, _, ok := disk(dir); ok {
		capacity[v1.ResourceEphemeralStorage] = *resource.NewQuantity(total, resource.BinarySI)
	}
	allocatable = capacity.DeepCopy()
	allocatable[v1.ResourceMemory] = *resource.NewQuantity(max(0, Memory()-reservedMemory), resource.BinarySI)
	return capacity, allocatable
}

func disk(dir string) (total, free int64, ok bool) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, 0, false
	}
	return int64(s.Blocks) * s.Bsize, int64(s.Bavail) * s.Bsize, true
}

// conditions says how the node is. An error means that the runtime did not
// answer, which the conditions say too.
func (n *Node) conditions(ctx context.Context) ([]v1.NodeCondition, error) {
	out := []v1.NodeCondition{
		pressure(v1.NodeMemoryPressure, meminfo("MemAvailable") < lowMemory, "Memory", "there is little memory left"),
		pressure(v1.NodeDiskPressure, shortOfDisk(n.cfg.Dir), "Disk", "there is little space left on the disk of "+n.cfg.Dir),
		pressure(v1.NodePIDPressure, shortOfPIDs(), "PID", "there are few process numbers left"),
	}
	version, err := n.cfg.Runtime.Version(ctx)
	var list []*cri.RuntimeCondition
	if err == nil {
		n.mu.Lock()
		n.version = version
		n.mu.Unlock()
		list, err = n.cfg.Runtime.Conditions(ctx)
	}
	return append(out, readiness(list, err)...), err
}

func pressure(t v1.NodeConditionType, short bool, what, message string) v1.NodeCondition {
	if short {
		return v1.NodeCondition{Type: t, Status: v1.ConditionTrue, Reason: "KubeletHas" + what + "Pressure", Message: message}
	}
	return v1.NodeCondition{Type: t, Status: v1.ConditionFalse, Reason: "KubeletHasNo" + what + "Pressure", Message: "there is enough"}
}

func shortOfDisk(dir string) bool {
	total, free, ok := disk(dir)
	return ok && free < lowDiskBytes && free < total/100*lowDiskPercent
}

func shortOfPIDs() bool {
	most, err := strconv.Atoi(readLine("/proc/sys/kernel/pid_max"))
	fields := strings.Fields(readLine("/proc/loadavg"))
	if err != nil || len(fields) < 4 {
		return false
	}
	_, all, _ := strings.Cut(fields[3], "/")
	now, err := strconv.Atoi(all)
	return err == nil && now > most/10*9
}

// readiness are the conditions Ready and NetworkUnavailable.
func readiness(list []*cri.RuntimeCondition, err error) []v1.NodeCondition {
	ready := v1.NodeCondition{Type: v1.NodeReady, Status: v1.ConditionTrue, Reason: "KubeletReady", Message: "meshd's agent is ready"}
	network := v1.NodeCondition{Type: v1.NodeNetworkUnavailable, Status: v1.ConditionFalse, Reason: "RuntimeNetworkReady", Message: "the runtime's network is ready"}
	if err != nil {
		ready.Status, ready.Reason, ready.Message = v1.ConditionFalse, "ContainerRuntimeUnreachable", err.Error()
		return []v1.NodeCondition{ready}
	}
	for _, c := range list {
		if c.Status {
			continue
		}
		text := fmt.Sprintf("%s: %s %s", c.Type, c.Reason, c.Message)
		switch c.Type {
		case cri.RuntimeReady:
			ready.Status, ready.Reason, ready.Message = v1.ConditionFalse, "ContainerRuntimeNotReady", text
		case cri.NetworkReady:
			network.Status, network.Reason, network.Message = v1.ConditionTrue, "RuntimeNetworkNotReady", text
			if ready.Status == v1.ConditionTrue {
				ready.Status, ready.Reason, ready.Message = v1.ConditionFalse, "NetworkPluginNotReady", text
			}
		}
	}
	return []v1.NodeCondition{ready, network}
}

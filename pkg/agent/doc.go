// Package agent runs the pods of one node over CRI, the interface that
// containerd and CRI-O speak, and tells the API what became of them. It is
// what the kubelet is to Kubernetes, for a cluster that meshd serves itself.
//
// One worker a pod compares what the pod's object asks with what the runtime
// has, and does the difference: observe, plan (pure, pkg/agent/plan), do,
// report. Exits arrive as events of the runtime and are acted on when they
// happen; a slow re-list is the safety net. What the agent knows lies in the
// runtime's labels and annotations and in checkpoints of the pods' objects, so
// that a restart of the agent changes nothing for a pod.
//
// What it leaves out is refused by name (pkg/agent/podspec), never ignored:
// device plugins, dynamic resources, block volumes, ephemeral containers, CSI
// and network volumes, user namespaces, Windows. The environment variables
// that Kubernetes makes for services are left out; use names.
package agent

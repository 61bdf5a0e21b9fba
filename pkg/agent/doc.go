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
// Until the API has given the first whole list of this node's pods, a pod known
// from its checkpoint alone gets no new sandbox, for it may have been replaced
// elsewhere while the machine was off; what lives is looked after as always.
// When the API has not answered 10 seconds after the start, such pods run all
// the same (a node alone runs what it ran), except those of a StatefulSet,
// which wait for as long as it takes: two of one identity are worse than none.
//
// Only joining makes a Node object. When a node was removed from the cluster,
// the agent says so and asks again slowly; it ends no pod for that.
//
// What it leaves out is refused by name (pkg/agent/podspec), never ignored:
// device plugins, dynamic resources, block volumes, ephemeral containers, CSI
// and network volumes, user namespaces, Windows. The environment variables
// that Kubernetes makes for services are left out; use names.
package agent

// Package kubernetes runs a Kubernetes that is not ours in the lab, and meshd as
// its CNI: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet
// and kube-proxy as upstream has them, three machines with containerd, and the
// DaemonSet of manifests/ with our image. Its stories are what meshd promises
// somebody who has a cluster already.
//
// It needs root, containerd and runc, bin/ of make and bin/tools of
// make test-kubernetes. The address plan, besides the lab's own (test/netlab):
//
//	m1 .1            control plane and node
//	m2 .2, m3 .3     nodes; m4 .5 a node that comes later
//	out .4           a machine that is not of the cluster
//	10.244.0.0/16    fd00:10:244::/48   pods, a /24 and a /64 a node
//	10.96.0.0/16     fd00:10:96::/112   services; 10.96.0.10 is kube-dns
//
// Reading order: world.go (what there is), control.go and node.go (how it comes
// up), steps.go (what must be true).
package kubernetes

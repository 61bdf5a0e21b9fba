package kubernetes

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"meshd.dev/test/netlab"
)

// kubeletConfig is what a kubelet needs in a machine of the lab, whose kernel
// and cgroups are the host's: a host of cgroup v1 is fine, oom scores may not be
// lowered, a full disk of the host is nobody's business here, and images that
// were imported are not to be collected.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: ` + pkiDir + `ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: ` + pkiDir + `kubelet.crt
tlsPrivateKeyFile: ` + pkiDir + `kubelet.key
clusterDNS: ["` + dnsService + `"]
clusterDomain: cluster.local
resolvConf: /etc/resolv.conf
failSwapOn: false
oomScoreAdj: 0
evictionHard: {memory.available: 1Mi, nodefs.available: 1Mi, nodefs.inodesFree: "1", imagefs.available: 1Mi}
imageGCHighThresholdPercent: 100
`

// tunables are the kernel's own that a kubelet wants otherwise. A machine shows
// them as wanted and leaves the host's as they are.
var tunables = map[string]string{
	"kernel/panic": "10", "kernel/panic_on_oops": "1", "vm/overcommit_memory": "1", "vm/panic_on_oom": "0",
	"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
}

func showTunables(ctx context.Context, m *netlab.Machine) error {
	var script strings.Builder
	for path, value := range tunables {
		shown := "/run/sysctl-" + strings.ReplaceAll(path, "/", "-")
		fmt.Fprintf(&script, "echo %s > %s && mount --bind %s /proc/sys/%s && ", value, shown, shown, path)
	}
	_, err := m.Run(ctx, "sh", "-c", script.String()+"true")
	return err
}

// StartNode starts kubelet, and kube-proxy where the world has it, on a machine.
func (w *World) StartNode(ctx context.Context, m *netlab.Machine) error {
	if err := showTunables(ctx, m); err != nil {
		return err
	}
	if err := w.writeNodeKeys(m); err != nil {
		return err
	}
	if err := w.start(ctx, m, "kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
		"--hostname-override="+m.Name, "--node-ip="+m.IPv4().String()+","+m.IPv6().String()); err != nil {
		return err
	}
	if w.cfg.Services == Ours {
		return nil
	}
	// The conntrack limits are the kernel's, not a namespace's.
	return w.start(ctx, m, "kube-proxy", "--kubeconfig=/etc/kubernetes/kube-proxy.kubeconfig", "--proxy-mode=nftables",
		"--cluster-cidr="+podCIDRs, "--hostname-override="+m.Name,
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
}

func (w *World) writeNodeKeys(m *netlab.Machine) error {
	name := "system:node:" + m.Name
	serving, err := w.ca.sign(identity{user: name, groups: []string{"system:nodes"}, names: []string{m.Name}, addrs: []netip.Addr{m.IPv4(), m.IPv6()}})
	if err != nil {
		return err
	}
	for path, b := range map[string][]byte{
		"/etc/kubernetes/kubelet.yaml": []byte(kubeletConfig), pkiDir + "ca.crt": w.ca.pem,
		pkiDir + "kubelet.crt": serving.cert, pkiDir + "kubelet.key": serving.key,
	} {
		if err := m.WriteFile(path, b, 0o600); err != nil {
			return err
		}
	}
	if err := w.writeKubeconfig(m, "/etc/kubernetes/kubelet.kubeconfig", identity{user: name, groups: []string{"system:nodes"}}); err != nil {
		return err
	}
	return w.writeKubeconfig(m, "/etc/kubernetes/kube-proxy.kubeconfig", identity{user: "system:kube-proxy"})
}

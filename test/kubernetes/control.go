package kubernetes

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// The cluster's ranges, both families.
const (
	podCIDRs     = "10.244.0.0/16,fd00:10:244::/48"
	serviceCIDRs = "10.96.0.0/16,fd00:10:96::/112"
	dnsService   = "10.96.0.10"
)

// Folders of a machine.
const (
	tools   = "/usr/local/bin/tools/" // bin/tools
	pkiDir  = "/etc/kubernetes/pki/"
	adminKC = "/etc/kubernetes/admin.kubeconfig"
)

// A daemon is a program of the control plane or of a node: its log is
// /var/log/NAME.log on its machine.
type daemon struct {
	machine, name string
	pid           int
}

// start runs a program of Kubernetes on a machine.
func (w *World) start(ctx context.Context, m *netlab.Machine, name string, args ...string) error {
	pid, err := m.Start(ctx, name, append([]string{tools + name}, args...)...)
	if err != nil {
		return err
	}
	w.daemons = append(w.daemons, daemon{m.Name, name, pid})
	return nil
}

// ended says which daemon that should run does not; nil if all do.
func (w *World) ended() error {
	var errs error
	for _, d := range w.daemons {
		if m := w.Machine(d.machine); m.On() && !netlab.Alive(d.pid) {
			errs = errors.Join(errs, fmt.Errorf("%s on %s has ended:\n%s", d.name, d.machine,
				cluster.LastLines(m.Disk("/var/log/"+d.name+".log"), 15)))
		}
	}
	return errs
}

// Until waits like cluster.Until, but not for what a dead daemon would have to do.
func (w *World) Until(ctx context.Context, ok func(context.Context) error) error {
	return cluster.Until(ctx, func(ctx context.Context) error {
		err := ok(ctx)
		if err != nil {
			if dead := w.ended(); dead != nil {
				return cluster.Final{Err: errors.Join(err, dead)}
			}
		}
		return err
	})
}

// StartControlPlane starts etcd and the three of the control plane on m1 and
// waits until the API is ready.
func (w *World) StartControlPlane(ctx context.Context) error {
	m := w.Machine("m1")
	if err := w.writeServerKeys(m); err != nil {
		return err
	}
	if err := w.start(ctx, m, "etcd", "--data-dir=/var/lib/etcd", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380"); err != nil {
		return err
	}
	if err := w.start(ctx, m, "kube-apiserver", apiserverArgs(m.IPv4())...); err != nil {
		return err
	}
	admin, err := w.ca.kubeconfig(w.server(), identity{user: "admin", groups: []string{"system:masters"}})
	if err != nil {
		return err
	}
	if err := m.WriteFile(adminKC, admin, 0o600); err != nil {
		return err
	}
	// The other two end at once where the API does not know their roles yet.
	if err := w.Until(ctx, func(ctx context.Context) error { return w.Connect(ctx, m, admin) }); err != nil {
		return err
	}
	for name, args := range map[string][]string{"kube-controller-manager": w.controllerArgs(), "kube-scheduler": nil} {
		kc := "/etc/kubernetes/" + name + ".kubeconfig"
		if err := w.writeKubeconfig(m, kc, identity{user: "system:" + name}); err != nil {
			return err
		}
		args = append(args, "--kubeconfig="+kc, "--authentication-kubeconfig="+kc, "--authorization-kubeconfig="+kc, "--leader-elect=false")
		if err := w.start(ctx, m, name, args...); err != nil {
			return err
		}
	}
	return nil
}

// server is the API's address for everybody.
func (w *World) server() string {
	return "https://" + net.JoinHostPort(w.Machine("m1").IPv4().String(), "6443")
}

func (w *World) writeKubeconfig(m *netlab.Machine, path string, id identity) error {
	kc, err := w.ca.kubeconfig(w.server(), id)
	if err != nil {
		return err
	}
	return m.WriteFile(path, kc, 0o600)
}

// writeServerKeys writes what the control plane holds.
func (w *World) writeServerKeys(m *netlab.Machine) error {
	tokens, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	files := map[string][]byte{"ca.crt": w.ca.pem}
	for name, key := range map[string]*ecdsa.PrivateKey{"ca.key": w.ca.key, "sa.key": tokens} {
		if files[name], err = keyPEM(key); err != nil {
			return err
		}
	}
	for name, id := range map[string]identity{
		"apiserver": {user: "kube-apiserver",
			names: []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"},
			addrs: []netip.Addr{m.IPv4(), m.IPv6(), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:10:96::1")}},
		"kubelet-client": {user: "apiserver-kubelet-client", groups: []string{"system:masters"}},
		"front-proxy":    {user: "front-proxy-client"},
	} {
		p, err := w.ca.sign(id)
		if err != nil {
			return err
		}
		files[name+".crt"], files[name+".key"] = p.cert, p.key
	}
	for name, b := range files {
		if err := m.WriteFile(pkiDir+name, b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func apiserverArgs(addr netip.Addr) []string {
	return append(strings.Fields(`
		--etcd-servers=http://127.0.0.1:2379 --secure-port=6443 --allow-privileged=true
		--authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction
		--service-account-issuer=https://kubernetes.default.svc.cluster.local --kubelet-preferred-address-types=InternalIP
		--requestheader-allowed-names=front-proxy-client --requestheader-extra-headers-prefix=X-Remote-Extra-
		--requestheader-group-headers=X-Remote-Group --requestheader-username-headers=X-Remote-User`),
		"--advertise-address="+addr.String(), "--service-cluster-ip-range="+serviceCIDRs,
		"--client-ca-file="+pkiDir+"ca.crt", "--requestheader-client-ca-file="+pkiDir+"ca.crt", "--kubelet-certificate-authority="+pkiDir+"ca.crt",
		"--tls-cert-file="+pkiDir+"apiserver.crt", "--tls-private-key-file="+pkiDir+"apiserver.key",
		"--kubelet-client-certificate="+pkiDir+"kubelet-client.crt", "--kubelet-client-key="+pkiDir+"kubelet-client.key",
		"--proxy-client-cert-file="+pkiDir+"front-proxy.crt", "--proxy-client-key-file="+pkiDir+"front-proxy.key",
		"--service-account-signing-key-file="+pkiDir+"sa.key", "--service-account-key-file="+pkiDir+"sa.key")
}

func (w *World) controllerArgs() []string {
	args := []string{"--service-account-private-key-file=" + pkiDir + "sa.key", "--root-ca-file=" + pkiDir + "ca.crt",
		"--cluster-signing-cert-file=" + pkiDir + "ca.crt", "--cluster-signing-key-file=" + pkiDir + "ca.key",
		"--use-service-account-credentials", "--service-cluster-ip-range=" + serviceCIDRs}
	if w.cfg.NoPodCIDRs {
		return append(args, "--allocate-node-cidrs=false")
	}
	return append(args, "--allocate-node-cidrs=true", "--cluster-cidr="+podCIDRs, "--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64")
}

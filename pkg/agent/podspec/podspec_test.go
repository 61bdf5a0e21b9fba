package podspec

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// shelf is a few objects by name.
type shelf struct {
	secrets map[string]map[string]string
	maps    map[string]map[string]string
}

func (s shelf) Secret(_, name string) (*v1.Secret, error) {
	if d, ok := s.secrets[name]; ok {
		out := &v1.Secret{Data: map[string][]byte{}}
		for k, v := range d {
			out.Data[k] = []byte(v)
		}
		return out, nil
	}
	return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "secrets"}, name)
}

func (s shelf) ConfigMap(_, name string) (*v1.ConfigMap, error) {
	if d, ok := s.maps[name]; ok {
		return &v1.ConfigMap{Data: d}, nil
	}
	return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "configmaps"}, name)
}

func TestExpand(t *testing.T) {
	vars := map[string]string{"A": "1", "B": "$(A)"}
	for in, want := range map[string]string{
		"plain": "plain", "$(A)": "1", "x$(A)y$(A)": "x1y1", "$(B)": "$(A)", "$(NONE)": "$(NONE)",
		"$$(A)": "$(A)", "$$$(A)": "$1", "$": "$", "$(A": "$(A", "$A": "$A", "a$": "a$", "": "", "$()": "$()",
	} {
		if got := Expand(in, func(n string) (string, bool) { v, ok := vars[n]; return v, ok }); got != want {
			t.Errorf("%q gives %q, want %q", in, got, want)
		}
	}
}

func FuzzExpand(f *testing.F) {
	f.Add("$(A)$$(B)$(")
	f.Fuzz(func(t *testing.T, s string) {
		// Without variables only $$ is shortened.
		got := Expand(s, func(string) (string, bool) { return "", false })
		if len(got) > len(s) || !strings.Contains(s, "$$") && got != s {
			t.Errorf("%q gives %q", s, got)
		}
	})
}

func TestEnv(t *testing.T) {
	yes := true
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", UID: "u", Labels: map[string]string{"a/b": "c"}}, Spec: v1.PodSpec{NodeName: "n"}}
	objects := shelf{maps: map[string]map[string]string{"cm": {"key": "v", "not valid": "x", "K2": "v2"}}, secrets: map[string]map[string]string{"s": {"pass": "word"}}}
	field := func(p string) *v1.EnvVarSource {
		return &v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{FieldPath: p}}
	}
	res := func(r string, d string) *v1.EnvVarSource {
		return &v1.EnvVarSource{ResourceFieldRef: &v1.ResourceFieldSelector{Resource: r, Divisor: resource.MustParse(d)}}
	}
	key := func(name, key string, opt *bool) *v1.EnvVarSource {
		return &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: v1.LocalObjectReference{Name: name}, Key: key, Optional: opt}}
	}
	c := &v1.Container{
		EnvFrom: []v1.EnvFromSource{
			{Prefix: "CM_", ConfigMapRef: &v1.ConfigMapEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}},
			{SecretRef: &v1.SecretEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "none"}, Optional: &yes}},
			{SecretRef: &v1.SecretEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "s"}}},
		},
		Resources: v1.ResourceRequirements{Limits: v1.ResourceList{v1.ResourceCPU: resource.MustParse("1500m")}},
	}
	for _, tc := range []struct {
		name, value string
		from        *v1.EnvVarSource
		want        string // of X; "!..." is an error's text
	}{
		{"plain", "a", nil, "a"},
		{"refers to an earlier one", "$(pass)-$(CM_key)", nil, "word-v"},
		{"field", "", field("metadata.labels['a/b']"), "c"},
		{"node", "", field("spec.nodeName"), "n"},
		{"pod addresses", "", field("status.podIPs"), "10.0.0.1,fd00::1"},
		{"host address", "", field("status.hostIP"), "192.0.2.1"},
		{"unknown field", "", field("spec.colour"), `!environment variable X: field path "spec.colour" is not supported`},
		{"cpu rounds up", "", res("limits.cpu", "0"), "2"},
		{"cpu in thousandths", "", res("limits.cpu", "1m"), "1500"},
		{"memory falls back to the node's", "", res("limits.memory", "1Mi"), "1024"},
		{"request falls back to the limit", "", res("requests.cpu", "1m"), "1500"},
		{"key", "", key("cm", "key", nil), "v"},
		{"no such key", "", key("cm", "nokey", nil), `!environment variable X: key "nokey" is not in configmap ns/cm`},
		{"no such key, which may be", "", key("cm", "nokey", &yes), ""},
		{"no such object", "", key("none", "k", nil), `!environment variable X: configmaps "none" not found`},
	} {
		c.Env = []v1.EnvVar{{Name: "X", Value: tc.value, ValueFrom: tc.from}}
		env, err := Env(pod, c, Node{IPs: []string{"192.0.2.1"}, Allocatable: v1.ResourceList{v1.ResourceMemory: resource.MustParse("1Gi")}}, []string{"10.0.0.1", "fd00::1"}, objects)
		got, _ := lookupIn(env)("X")
		if err != nil {
			got = "!" + err.Error()
		}
		if got != tc.want {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
		if _, ok := lookupIn(env)("CM_not valid"); ok {
			t.Error("a key that is no name became a variable")
		}
	}
}

func TestDNS(t *testing.T) {
	host := parseResolvConf("# x\nnameserver 192.0.2.53 # here\nsearch home.test .\noptions timeout:1\nnonsense\n")
	two := "2"
	for _, c := range []struct {
		name string
		spec v1.PodSpec
		dns  []netip.Addr
		want string
	}{
		{"cluster first", v1.PodSpec{DNSPolicy: v1.DNSClusterFirst}, []netip.Addr{netip.MustParseAddr("10.244.0.1")},
			"[10.244.0.1] [ns.svc.cluster.local svc.cluster.local cluster.local home.test] [ndots:5]"},
		{"cluster first on the host's network", v1.PodSpec{DNSPolicy: v1.DNSClusterFirst, HostNetwork: true}, []netip.Addr{netip.MustParseAddr("10.244.0.1")},
			"[192.0.2.53] [home.test] [timeout:1]"},
		{"with the host's network and the cluster's names", v1.PodSpec{DNSPolicy: v1.DNSClusterFirstWithHostNet, HostNetwork: true}, []netip.Addr{netip.MustParseAddr("10.244.0.1")},
			"[10.244.0.1] [ns.svc.cluster.local svc.cluster.local cluster.local home.test] [ndots:5]"},
		{"default", v1.PodSpec{DNSPolicy: v1.DNSDefault}, []netip.Addr{netip.MustParseAddr("10.244.0.1")}, "[192.0.2.53] [home.test] [timeout:1]"},
		{"none with its own", v1.PodSpec{DNSPolicy: v1.DNSNone, DNSConfig: &v1.PodDNSConfig{Nameservers: []string{"1.1.1.1"}, Searches: []string{"a.test"}}},
			nil, "[1.1.1.1] [a.test] []"},
		{"more of its own", v1.PodSpec{DNSPolicy: v1.DNSClusterFirst, DNSConfig: &v1.PodDNSConfig{Options: []v1.PodDNSConfigOption{{Name: "ndots", Value: &two}, {Name: "edns0"}}}},
			[]netip.Addr{netip.MustParseAddr("10.244.0.1")}, "[10.244.0.1] [ns.svc.cluster.local svc.cluster.local cluster.local home.test] [ndots:2 edns0]"},
		{"no resolver of the cluster yet", v1.PodSpec{DNSPolicy: v1.DNSClusterFirst}, nil, "[192.0.2.53] [home.test] [timeout:1]"},
	} {
		got := DNS(&v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns"}, Spec: c.spec}, c.dns, "cluster.local", host)
		if text := fmt.Sprint(got.Servers, got.Searches, got.Options); text != c.want {
			t.Errorf("%s: got %s, want %s", c.name, text, c.want)
		}
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 1.1.1.1\nsearch a b\noptions x\n")
	f.Fuzz(func(t *testing.T, s string) { parseResolvConf(s) })
}

func TestHostname(t *testing.T) {
	yes := true
	for _, c := range []struct {
		spec       v1.PodSpec
		host, fqdn string
	}{
		{v1.PodSpec{}, "web-0", ""},
		{v1.PodSpec{Hostname: "h"}, "h", ""},
		{v1.PodSpec{Subdomain: "db"}, "web-0", "web-0.db.ns.svc.cluster.local"},
		{v1.PodSpec{Subdomain: "db", SetHostnameAsFQDN: &yes}, "web-0.db.ns.svc.cluster.local", "web-0.db.ns.svc.cluster.local"},
		{v1.PodSpec{HostNetwork: true}, "node", ""},
	} {
		host, fqdn := Hostname(&v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web-0", Namespace: "ns"}, Spec: c.spec}, "node", "cluster.local")
		if host != c.host || fqdn != c.fqdn {
			t.Errorf("%+v: got %s %s, want %s %s", c.spec, host, fqdn, c.host, c.fqdn)
		}
	}
}

func TestUnsupported(t *testing.T) {
	no := false
	base := func(change func(*v1.Pod)) *v1.Pod {
		p := &v1.Pod{Spec: v1.PodSpec{Containers: []v1.Container{{Name: "c"}}}}
		change(p)
		return p
	}
	for want, change := range map[string]func(*v1.Pod){
		"":                                 func(*v1.Pod) {},
		"spec.hostUsers":                   func(p *v1.Pod) { p.Spec.HostUsers = &no },
		"spec.ephemeralContainers":         func(p *v1.Pod) { p.Spec.EphemeralContainers = make([]v1.EphemeralContainer, 1) },
		"spec.resourceClaims":              func(p *v1.Pod) { p.Spec.ResourceClaims = make([]v1.PodResourceClaim, 1) },
		"spec.containers[0].volumeDevices": func(p *v1.Pod) { p.Spec.Containers[0].VolumeDevices = make([]v1.VolumeDevice, 1) },
		"spec.containers[0].resources.limits[x.test/gpu]": func(p *v1.Pod) {
			p.Spec.Containers[0].Resources.Limits = v1.ResourceList{"x.test/gpu": resource.MustParse("1")}
		},
		"spec.volumes[v]": func(p *v1.Pod) {
			p.Spec.Volumes = []v1.Volume{{Name: "v", VolumeSource: v1.VolumeSource{CSI: &v1.CSIVolumeSource{}}}}
		},
	} {
		got := Unsupported(base(change))
		if !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("got %q, want it to name %q", got, want)
		}
	}
}

func TestResources(t *testing.T) {
	c := v1.Container{Resources: v1.ResourceRequirements{
		Requests: v1.ResourceList{v1.ResourceCPU: resource.MustParse("250m"), v1.ResourceMemory: resource.MustParse("1Gi")},
		Limits:   v1.ResourceList{v1.ResourceCPU: resource.MustParse("500m")}}}
	pod := &v1.Pod{Spec: v1.PodSpec{Containers: []v1.Container{c}}}
	r := linuxResources(pod, &c, 4<<30, -1000)
	if r.CpuShares != 256 || r.CpuQuota != 50000 || r.CpuPeriod != 100000 || r.OomScoreAdj != 750 || QOS(pod) != v1.PodQOSBurstable {
		t.Errorf("got %+v, %s", r, QOS(pod))
	}
	if r := linuxResources(&v1.Pod{Spec: v1.PodSpec{Containers: []v1.Container{{}}}}, &v1.Container{}, 4<<30, -1000); r.CpuShares != 2 || r.OomScoreAdj != 1000 {
		t.Errorf("best effort: %+v", r)
	}
	both := v1.ResourceList{v1.ResourceCPU: resource.MustParse("1"), v1.ResourceMemory: resource.MustParse("1Gi")}
	c = v1.Container{Resources: v1.ResourceRequirements{Requests: both, Limits: both}}
	pod.Spec.Containers[0] = c
	if r := linuxResources(pod, &c, 4<<30, 0); r.OomScoreAdj != 0 || QOS(pod) != v1.PodQOSGuaranteed {
		t.Errorf("guaranteed, on a machine that may not go below 0: %+v", r)
	}
}

func TestRegistryMatch(t *testing.T) {
	for _, c := range []struct {
		place, image string
		want         int
	}{
		{"https://index.docker.io/v1/", "nginx", 0},
		{"docker.io", "docker.io/library/nginx:1", 0},
		{"r.test", "r.test/a/b:1", 0},
		{"r.test/a", "r.test/a/b@sha256:0", 1},
		{"r.test/a", "r.test/ab:1", -1},
		{"r.test:5000", "r.test:5000/a", 0},
		{"r.test", "other.test/a", -1},
		{"*.test", "r.test/a", 0},
	} {
		if got := RegistryMatch(c.place, c.image); got != c.want {
			t.Errorf("%s for %s: got %d, want %d", c.place, c.image, got, c.want)
		}
	}
}

func TestNonRootMustBeProved(t *testing.T) {
	yes, user := true, int64(7)
	for _, c := range []struct {
		sc    v1.SecurityContext
		image *cri.Image
		fails bool
	}{
		{v1.SecurityContext{RunAsNonRoot: &yes}, &cri.Image{Uid: &cri.Int64Value{Value: 0}}, true},
		{v1.SecurityContext{RunAsNonRoot: &yes}, &cri.Image{Uid: &cri.Int64Value{Value: 5}}, false},
		{v1.SecurityContext{RunAsNonRoot: &yes}, &cri.Image{Username: "app"}, true},
		{v1.SecurityContext{RunAsNonRoot: &yes, RunAsUser: &user}, &cri.Image{Username: "app"}, false},
		{v1.SecurityContext{}, &cri.Image{}, false},
	} {
		k := &v1.Container{SecurityContext: &c.sc}
		cfg := &cri.ContainerConfig{Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}}}
		if err := UseImageUser(&v1.Pod{}, k, cfg, c.image); (err != nil) != c.fails {
			t.Errorf("%+v on %+v: %v", c.sc, c.image, err)
		}
	}
}

func TestRefs(t *testing.T) {
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns"}, Spec: v1.PodSpec{
		ImagePullSecrets: []v1.LocalObjectReference{{Name: "pull"}},
		Containers:       []v1.Container{{EnvFrom: []v1.EnvFromSource{{ConfigMapRef: &v1.ConfigMapEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}}}}},
		Volumes: []v1.Volume{{VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "sec"}}},
			{VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}}}}}}
	var got []string
	for _, r := range Refs(pod) {
		got = append(got, r.Kind+"/"+r.Name)
	}
	if want := []string{"secrets/pull", "configmaps/cm", "secrets/sec"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

package podspec

import (
	"net/netip"
	"os"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Limits of resolv.conf that the C library has.
const (
	maxServers  = 3
	maxSearches = 32
)

// ReadResolvConf parses a resolver configuration, as at /etc/resolv.conf. What
// it does not understand it passes over; a missing file is an empty one.
func ReadResolvConf(path string) *cri.DNSConfig {
	b, err := os.ReadFile(path)
	if err != nil {
		return &cri.DNSConfig{}
	}
	return parseResolvConf(string(b))
}

func parseResolvConf(text string) *cri.DNSConfig {
	cfg := &cri.DNSConfig{}
	for line := range strings.Lines(text) {
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			cfg.Servers = append(cfg.Servers, fields[1])
		case "search", "domain":
			cfg.Searches = slices.DeleteFunc(slices.Clone(fields[1:]), func(s string) bool { return s == "." })
		case "options":
			cfg.Options = append(cfg.Options, fields[1:]...)
		}
	}
	return cfg
}

// DNS is the resolver configuration of a pod; host is that of the node.
func DNS(pod *v1.Pod, servers []netip.Addr, domain string, host *cri.DNSConfig) *cri.DNSConfig {
	cfg := &cri.DNSConfig{}
	switch policy := pod.Spec.DNSPolicy; {
	case policy == v1.DNSNone:
	case policy == v1.DNSDefault,
		policy == v1.DNSClusterFirst && pod.Spec.HostNetwork,
		len(servers) == 0:
		cfg.Servers = slices.Clone(host.Servers)
		cfg.Searches = slices.Clone(host.Searches)
		cfg.Options = slices.Clone(host.Options)
	default:
		for _, s := range servers {
			cfg.Servers = append(cfg.Servers, s.String())
		}
		cfg.Searches = append([]string{pod.Namespace + ".svc." + domain, "svc." + domain, domain}, host.Searches...)
		cfg.Options = []string{"ndots:5"}
	}
	if d := pod.Spec.DNSConfig; d != nil {
		cfg.Servers = append(cfg.Servers, d.Nameservers...)
		cfg.Searches = append(cfg.Searches, d.Searches...)
		cfg.Options = mergeOptions(cfg.Options, d.Options)
	}
	cfg.Servers = firstFew(cfg.Servers, maxServers)
	cfg.Searches = firstFew(cfg.Searches, maxSearches)
	return cfg
}

// mergeOptions lets the pod's options replace those of the same name.
func mergeOptions(base []string, more []v1.PodDNSConfigOption) []string {
	for _, o := range more {
		base = slices.DeleteFunc(base, func(s string) bool {
			name, _, _ := strings.Cut(s, ":")
			return name == o.Name
		})
		text := o.Name
		if o.Value != nil && *o.Value != "" {
			text += ":" + *o.Value
		}
		base = append(base, text)
	}
	return base
}

// firstFew drops repetitions and what is beyond n.
func firstFew(list []string, n int) []string {
	var out []string
	for _, s := range list {
		if !slices.Contains(out, s) && len(out) < n {
			out = append(out, s)
		}
	}
	return out
}

// Hostname of the pod, and its fully qualified name when it has one.
func Hostname(pod *v1.Pod, nodeName, domain string) (host, fqdn string) {
	if pod.Spec.HostNetwork {
		return nodeName, ""
	}
	host = pod.Name
	if pod.Spec.Hostname != "" {
		host = pod.Spec.Hostname
	}
	if len(host) > 63 {
		host = strings.TrimRight(host[:63], "-.")
	}
	if pod.Spec.HostnameOverride != nil && *pod.Spec.HostnameOverride != "" {
		return *pod.Spec.HostnameOverride, ""
	}
	if pod.Spec.Subdomain != "" {
		fqdn = host + "." + pod.Spec.Subdomain + "." + pod.Namespace + ".svc." + domain
	}
	if fqdn != "" && pod.Spec.SetHostnameAsFQDN != nil && *pod.Spec.SetHostnameAsFQDN {
		return fqdn, fqdn
	}
	return host, fqdn
}

// Hosts is the text of the pod's /etc/hosts. For a pod in the network of the
// node base is the node's own file.
func Hosts(pod *v1.Pod, ips []string, host, fqdn string, base []byte) []byte {
	var b strings.Builder
	if pod.Spec.HostNetwork && base != nil {
		b.Write(base)
	} else {
		b.WriteString("# written by meshd for this pod\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" +
			"fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n")
		for _, ip := range ips {
			b.WriteString(ip + "\t")
			if fqdn != "" && fqdn != host {
				b.WriteString(fqdn + "\t")
			}
			b.WriteString(host + "\n")
		}
	}
	if len(pod.Spec.HostAliases) > 0 {
		b.WriteString("\n# from spec.hostAliases\n")
	}
	for _, a := range pod.Spec.HostAliases {
		b.WriteString(a.IP + "\t" + strings.Join(a.Hostnames, "\t") + "\n")
	}
	return []byte(b.String())
}

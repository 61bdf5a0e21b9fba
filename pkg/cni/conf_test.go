package cni

import (
	"errors"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

func TestArgs(t *testing.T) {
	for _, c := range []struct {
		in   string
		want PodRef
		ok   bool
	}{
		{"", PodRef{}, true},
		{"IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-0;K8S_POD_UID=u-1;K8S_POD_INFRA_CONTAINER_ID=abc;X=y", PodRef{"prod", "web-0", "u-1"}, true},
		{"K8S_POD_NAMESPACE=prod;", PodRef{Namespace: "prod"}, true},
		{"K8S_POD_NAME=a=b", PodRef{Name: "a=b"}, true},
		{"X=y", PodRef{}, false},
		{"X=y;IgnoreUnknown=0", PodRef{}, false},
		{"X=y;IgnoreUnknown=true", PodRef{}, true},
		{"nonsense", PodRef{}, false},
	} {
		got, err := parseArgs(c.in)
		if (err == nil) != c.ok || got.pod != c.want {
			t.Errorf("%q: %+v, %v", c.in, got.pod, err)
		}
	}
}

func FuzzArgs(f *testing.F) {
	f.Add("IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-0;IP=10.0.0.1,fd00::1;MAC=0e:00:00:00:00:01")
	f.Add(";;=;a=")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parseArgs(s)
		if err != nil {
			wantCoded(t, err)
			return
		}
		c := &conf{}
		if _, err := c.wishes(a); err != nil {
			wantCoded(t, err)
		}
	})
}

func FuzzConf(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"meshd","type":"mesh","ranges":["10.244.1.0/24","fd00::/64"],"reserved":["10.244.1.9"],"mtu":1420,
		"dataDir":"/x","quarantineSeconds":3,"runtimeConfig":{"ips":["10.244.1.5/24"],"mac":"0e:00:00:00:00:01"},"args":{"cni":{"ips":["fd00::5"]}}}`))
	f.Add([]byte(`{"cniVersion":"0.3.1","name":"x","ranges":["0.0.0.0/0"],"prevResult":{"cniVersion":"0.3.1","ips":[{"version":"4","address":"192.0.2.1/24"}]}}`))
	f.Add([]byte(`{"name":"x","ranges":[{"subnet":"10.1.0.0/16","rangeStart":"10.1.0.5","rangeEnd":"10.1.0.4"}],"table":"meshd","hostLocalDir":"x","runtimeConfig":{"portMappings":[{"hostPort":80,
		"containerPort":8080,"protocol":"sctp","hostIP":"::ffff:192.0.2.1"}],"bandwidth":{"ingressRate":18446744073709551615,"egressBurst":1},"ipRanges":[[{"subnet":"fd00::/126","rangeStart":"fd00::3"}],[]],
		"dns":{"servers":["x"],"searches":["a"]},"io.kubernetes.cri.pod-annotations":{"meshd.dev/ips":",","meshd.dev/mac":"x"}}}`))
	f.Add([]byte(`{"name":"x","ranges":["10.1.0.0/24"],"table":"meshd","runtimeConfig":{"bandwidth":{"ingressRate":18446744073709551615,"egressRate":8000,"egressBurst":18446744073709551615}}}`))
	f.Add([]byte(`{"name":"..","cni.dev/valid-attachments":[{"containerID":"x"}]}`))
	f.Fuzz(func(t *testing.T, stdin []byte) {
		c, err := parseConf(stdin)
		if err != nil {
			wantCoded(t, err)
			return
		}
		if err := c.complete(); err != nil {
			wantCoded(t, err)
			return
		}
		w, err := c.wishes(args{})
		if err != nil {
			wantCoded(t, err)
		}
		for _, l := range []limit{w.toPod, w.fromPod} {
			if q := l.tbf(1, "eth0"); l.Rate > 0 && (q.Limit < q.Burst || q.Burst == 0) {
				t.Errorf("a limit that lets nothing through: %v", q)
			}
		}
		p := pool{ranges: c.ranges, reserved: c.reserved}
		if got, err := p.choose(nil); err == nil && len(got) == 0 {
			t.Errorf("no address and no error from %v", c.ranges)
		}
	})
}

func wantCoded(t *testing.T, err error) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) || e.Code == 0 {
		t.Errorf("%v has no error code", err)
	}
}

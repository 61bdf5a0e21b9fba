package probe

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// A course of answers, + and -, by kind: s, l, r; after each the health.
func TestVerdict(t *testing.T) {
	p := &v1.Probe{SuccessThreshold: 1, FailureThreshold: 2}
	c := &v1.Container{Name: "c", StartupProbe: p, LivenessProbe: p, ReadinessProbe: p}
	for _, tc := range []struct{ name, course, want string }{
		{"nothing yet", "", ""},
		{"started", "s+", "started"},
		{"ready", "s+ r+", "started ready"},
		{"one bad answer is none", "s+ r+ r-", "started ready"},
		{"two are", "s+ r+ r- r-", "started"},
		{"a good one between begins anew", "s+ r+ r- r+ r-", "started ready"},
		{"and back", "s+ r+ r- r- r+", "started ready"},
		{"liveness kills", "s+ r+ l- l-", "started ready sick"},
		{"startup kills", "s- s-", "sick"},
	} {
		v := newVerdict(c)
		kinds := map[byte]Kind{'s': Startup, 'l': Liveness, 'r': Readiness}
		for step := range strings.FieldsSeq(tc.course) {
			var err error
			if step[1] == '-' {
				err = errors.New("no")
			}
			v.add(kinds[step[0]], p, "c", err)
		}
		var got []string
		if v.health.Started {
			got = append(got, "started")
		}
		if v.health.Ready {
			got = append(got, "ready")
		}
		if v.health.Unhealthy != "" {
			got = append(got, "sick")
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%s: got %v, want %s", tc.name, got, tc.want)
		}
	}
	if h := newVerdict(&v1.Container{}).health; !h.Started || !h.Ready {
		t.Errorf("without probes: %+v", h)
	}
}

func TestOnce(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/ok" && r.Header.Get("X-A") == "b" && r.Host == "name.test":
		case r.URL.Path == "/away":
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		default:
			http.Error(w, "bad", http.StatusTeapot)
		}
	}))
	defer web.Close()
	host, text, _ := net.SplitHostPort(web.Listener.Addr().String())
	port, _ := strconv.Atoi(text)
	target := Target{IP: host, Spec: &v1.Container{Ports: []v1.ContainerPort{{Name: "web", ContainerPort: int32(port)}}}}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	go func() { _ = srv.Serve(l) }()
	defer srv.Stop()
	grpcPort := int32(l.Addr().(*net.TCPAddr).Port)
	bad := "nothing"

	exec := func(_ context.Context, _ string, cmd []string, _ time.Duration) ([]byte, int32, error) {
		return []byte("out"), int32(len(cmd) - 1), nil
	}
	get := func(path string, port intstr.IntOrString) v1.ProbeHandler {
		return v1.ProbeHandler{HTTPGet: &v1.HTTPGetAction{Path: path, Port: port, HTTPHeaders: []v1.HTTPHeader{{Name: "X-A", Value: "b"}, {Name: "Host", Value: "name.test"}}}}
	}
	for _, c := range []struct {
		name string
		h    v1.ProbeHandler
		err  string
	}{
		{"http", get("/ok", intstr.FromString("web")), ""},
		{"http, bad answer", get("/no", intstr.FromInt(port)), "statuscode: 418"},
		{"http, redirected to another host", get("/away", intstr.FromInt(port)), ""},
		{"http, unknown port", get("/ok", intstr.FromString("none")), "port none"},
		{"tcp", v1.ProbeHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt(port)}}, ""},
		{"tcp, closed", v1.ProbeHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt(1)}}, "refused"},
		{"grpc", v1.ProbeHandler{GRPC: &v1.GRPCAction{Port: grpcPort}}, ""},
		{"grpc, unknown service", v1.ProbeHandler{GRPC: &v1.GRPCAction{Port: grpcPort, Service: &bad}}, "NotFound"},
		{"exec", v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"true"}}}, ""},
		{"exec, failing", v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"false", "x"}}}, `exited with 1: out`},
		{"nothing", v1.ProbeHandler{}, "says nothing"},
	} {
		err := Once(t.Context(), c.h, target, 5*time.Second, exec)
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.err)
		}
	}
}

// Package probe asks containers how they are: over HTTP, TCP, gRPC, or by a
// command in them.
package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Exec runs a command in a container within a time and returns what it said
// and its exit code.
type Exec func(ctx context.Context, container string, cmd []string, limit time.Duration) ([]byte, int32, error)

// Target is the container that is asked.
type Target struct {
	ID   string
	IP   string
	Spec *v1.Container
}

const maxAnswer = 10 << 10

// Once asks and returns nil when the answer is good.
func Once(ctx context.Context, h v1.ProbeHandler, t Target, limit time.Duration, exec Exec) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	switch {
	case h.Exec != nil:
		return command(ctx, t.ID, h.Exec.Command, limit, exec)
	case h.HTTPGet != nil:
		return get(ctx, h.HTTPGet, t)
	case h.TCPSocket != nil:
		return connect(ctx, h.TCPSocket, t)
	case h.GRPC != nil:
		return grpcHealth(ctx, h.GRPC, t)
	}
	return errors.New("the probe says nothing of how to ask")
}

func command(ctx context.Context, id string, cmd []string, limit time.Duration, exec Exec) error {
	out, code, err := exec(ctx, id, cmd, limit)
	if err != nil {
		return fmt.Errorf("command %q: %w", strings.Join(cmd, " "), err)
	}
	if code != 0 {
		return fmt.Errorf("command %q exited with %d: %s", strings.Join(cmd, " "), code, short(out))
	}
	return nil
}

func short(b []byte) string {
	return strings.TrimSpace(string(b[:min(len(b), 512)]))
}

// Port is the number a probe or hook names.
func Port(p intstr.IntOrString, c *v1.Container) (int, error) {
	n := p.IntValue()
	if p.Type == intstr.String {
		i := slices.IndexFunc(c.Ports, func(q v1.ContainerPort) bool { return q.Name == p.StrVal })
		if i >= 0 {
			n = int(c.Ports[i].ContainerPort)
		}
	}
	if n < 1 || n > 65535 {
		return 0, fmt.Errorf("port %s is neither a number from 1 to 65535 nor the name of a port", p.String())
	}
	return n, nil
}

var transport = &http.Transport{
	TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // as Kubernetes documents: no verification
	DisableKeepAlives: true,
	Proxy:             nil,
	DialContext:       (&net.Dialer{}).DialContext,
}

func get(ctx context.Context, a *v1.HTTPGetAction, t Target) error {
	return httpGet(ctx, a, t)
}

// Get is the HTTP action of a hook.
func Get(ctx context.Context, a *v1.HTTPGetAction, t Target) error { return httpGet(ctx, a, t) }

func httpGet(ctx context.Context, a *v1.HTTPGetAction, t Target) error {
	port, err := Port(a.Port, t.Spec)
	if err != nil {
		return err
	}
	host := a.Host
	if host == "" {
		host = t.IP
	}
	u, err := url.Parse(a.Path)
	if err != nil {
		u = &url.URL{Path: a.Path}
	}
	u.Scheme = strings.ToLower(string(a.Scheme))
	if u.Scheme == "" {
		u.Scheme = "http"
	}
	u.Host = net.JoinHostPort(host, strconv.Itoa(port))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "kube-probe/1.37")
	req.Header.Set("Accept", "*/*")
	for _, h := range a.HTTPHeaders {
		if strings.EqualFold(h.Name, "Host") {
			req.Host = h.Value
			continue
		}
		req.Header.Set(h.Name, h.Value)
	}
	client := &http.Client{Transport: transport, CheckRedirect: sameHost}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode < 200 || resp.StatusCode >= 400 {
		return fmt.Errorf("HTTP probe failed with statuscode: %d %s", resp.StatusCode, short(body))
	}
	return nil
}

// sameHost follows redirects on the same host; one to another is an answer.
func sameHost(req *http.Request, via []*http.Request) error {
	if req.URL.Hostname() != via[0].URL.Hostname() {
		return http.ErrUseLastResponse
	}
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	return nil
}

func connect(ctx context.Context, a *v1.TCPSocketAction, t Target) error {
	port, err := Port(a.Port, t.Spec)
	if err != nil {
		return err
	}
	host := a.Host
	if host == "" {
		host = t.IP
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return err
	}
	return conn.Close()
}

func grpcHealth(ctx context.Context, a *v1.GRPCAction, t Target) error {
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(t.IP, strconv.Itoa(int(a.Port))),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	req := &grpc_health_v1.HealthCheckRequest{}
	if a.Service != nil {
		req.Service = *a.Service
	}
	r, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, req)
	if err != nil {
		return err
	}
	if r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("service unhealthy (responded with %q)", r.Status)
	}
	return nil
}

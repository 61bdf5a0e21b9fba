package agentproxy

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	genericrest "k8s.io/apiserver/pkg/registry/generic/rest"
	"k8s.io/apiserver/pkg/registry/rest"
)

type logREST struct{ proxy *Proxy }

var (
	_ rest.GetterWithOptions = (*logREST)(nil)
	_ rest.StorageMetadata   = (*logREST)(nil)
)

func (*logREST) New() runtime.Object { return &corev1.Pod{} }
func (*logREST) Destroy()            {}

// ProducesMIMETypes and ProducesObject are for the API's description.
func (*logREST) ProducesMIMETypes(string) []string { return []string{"text/plain"} }
func (*logREST) ProducesObject(string) any         { return "" }

func (*logREST) NewGetOptions() (runtime.Object, bool, string) {
	return &corev1.PodLogOptions{}, false, ""
}

// OverrideMetricsVerb counts logs as long-running.
func (*logREST) OverrideMetricsVerb(verb string) string {
	if verb == "GET" {
		return "CONNECT"
	}
	return verb
}

func (r *logREST) Get(ctx context.Context, name string, opts runtime.Object) (runtime.Object, error) {
	o, ok := opts.(*corev1.PodLogOptions)
	if !ok {
		return nil, fmt.Errorf("logs: unexpected options %T", opts)
	}
	if errs := checkLogOptions(o); len(errs) > 0 {
		return nil, apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("PodLogOptions").GroupKind(), name, errs)
	}
	pod, err := r.proxy.podOf(ctx, name)
	if err != nil {
		return nil, err
	}
	container, err := containerOf(pod, o.Container)
	if err != nil {
		return nil, err
	}
	a, err := r.proxy.agentOf(ctx, pod.Spec.NodeName)
	if err != nil {
		return nil, err
	}
	path := "/containerLogs/" + pod.Namespace + "/" + pod.Name + "/" + container
	return &logStream{agent: a, location: a.url(path, logQuery(o)), flush: o.Follow, pod: pod.Name}, nil
}

// logStream is a log on its way from the agent.
type logStream struct {
	agent    *agent
	location *url.URL
	flush    bool
	pod      string
}

var _ rest.ResourceStreamer = (*logStream)(nil)

func (*logStream) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }
func (*logStream) DeepCopyObject() runtime.Object   { panic("a log stream cannot be copied") }

// InputStream asks the agent; the log ends when ctx does.
func (s *logStream) InputStream(ctx context.Context, _, _ string) (io.ReadCloser, bool, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.location.String(), nil)
	if err != nil {
		return nil, false, "", fmt.Errorf("ask for logs: %w", err)
	}
	resp, err := s.agent.transport.RoundTrip(req) // no redirects
	if err != nil {
		return nil, false, "", explain(s.agent.node, err)
	}
	if resp.StatusCode >= 300 && resp.StatusCode < 400 {
		resp.Body.Close()
		return nil, false, "", explain(s.agent.node, fmt.Errorf("answers logs with a redirect"))
	}
	if err := genericrest.NewGenericHttpResponseChecker(corev1.Resource("pods/log"), s.pod).Check(resp); err != nil {
		resp.Body.Close()
		return nil, false, "", err
	}
	return resp.Body, s.flush, "text/plain", nil
}

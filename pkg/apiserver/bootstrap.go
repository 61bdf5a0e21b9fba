package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/wait"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/ptr"

	"meshd.dev/pkg/apiserver/upstream"
)

// bootstrapEvery is how often a failed attempt is repeated.
const bootstrapEvery = 200 * time.Millisecond

// systemNamespaces exist in every cluster.
var systemNamespaces = []string{metav1.NamespaceDefault, metav1.NamespaceSystem, metav1.NamespacePublic, corev1.NamespaceNodeLease}

// bootstrap puts into the cluster what every cluster has. The server is not
// ready before it is there.
func (s *Server) bootstrap(first netip.Addr) error {
	return s.crds.GenericAPIServer.AddPostStartHook("meshd-bootstrap", func(hook genericapiserver.PostStartHookContext) error {
		client := s.parts.client
		steps := []func(context.Context) error{
			func(ctx context.Context) error { return ensureNamespaces(ctx, client) },
			func(ctx context.Context) error { return upstream.EnsurePolicy(ctx, client) },
			func(ctx context.Context) error { return ensurePriorities(ctx, client) },
			func(ctx context.Context) error { return s.ensureKubernetes(ctx, client, first) },
		}
		for _, step := range steps {
			err := wait.PollUntilContextCancel(hook, bootstrapEvery, true, func(ctx context.Context) (bool, error) {
				err := step(ctx)
				if err != nil && ctx.Err() == nil {
					s.cfg.Log.Warn("prepare the cluster, trying again", "error", err)
				}
				return err == nil, nil
			})
			if err != nil {
				// Only the end of the server ends the attempts. An error
				// here would end the process.
				return nil
			}
		}
		return nil
	})
}

// created takes "it is there already" for success.
func created(err error) error {
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

func ensureNamespaces(ctx context.Context, client kubernetes.Interface) error {
	var errs []error
	for _, name := range systemNamespaces {
		_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		errs = append(errs, created(err))
	}
	return errors.Join(errs...)
}

func ensurePriorities(ctx context.Context, client kubernetes.Interface) error {
	var errs []error
	for name, value := range map[string]int32{"system-node-critical": 2000001000, "system-cluster-critical": 2000000000} {
		class := &schedulingv1.PriorityClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Value: value}
		_, err := client.SchedulingV1().PriorityClasses().Create(ctx, class, metav1.CreateOptions{})
		errs = append(errs, created(err))
	}
	return errors.Join(errs...)
}

// ensureKubernetes makes default/kubernetes lead to this server.
func (s *Server) ensureKubernetes(ctx context.Context, client kubernetes.Interface, first netip.Addr) error {
	_, port, err := s.crds.GenericAPIServer.SecureServingInfo.HostPort()
	if err != nil {
		return fmt.Errorf("find port of the API: %w", err)
	}
	meta := metav1.ObjectMeta{Name: "kubernetes", Namespace: metav1.NamespaceDefault,
		Labels: map[string]string{"component": "apiserver", "provider": "kubernetes"}}
	svc := &corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, ClusterIP: first.String(), ClusterIPs: []string{first.String()},
		IPFamilies: []corev1.IPFamily{family(first)}, IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicySingleStack),
		SessionAffinity: corev1.ServiceAffinityNone,
		Ports:           []corev1.ServicePort{{Name: "https", Protocol: corev1.ProtocolTCP, Port: 443, TargetPort: intstr.FromInt(port)}},
	}}
	if err := ensureService(ctx, client, svc); err != nil {
		return fmt.Errorf("ensure service kubernetes: %w", err)
	}
	if s.cfg.AdvertiseAddress.IsLoopback() {
		// No pod can reach it, and Kubernetes allows no such endpoint.
		return nil
	}
	if err := ensureEndpoints(ctx, client, s.cfg.AdvertiseAddress, int32(port)); err != nil {
		return fmt.Errorf("ensure endpoints of service kubernetes: %w", err)
	}
	return nil
}

func family(a netip.Addr) corev1.IPFamily {
	if a.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

// ensureService creates svc or gives the existing one its ports. Somebody may
// have made it dual stack; that stays.
func ensureService(ctx context.Context, client kubernetes.Interface, svc *corev1.Service) error {
	services := client.CoreV1().Services(svc.Namespace)
	have, err := services.Get(ctx, svc.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = services.Create(ctx, svc, metav1.CreateOptions{})
		return created(err)
	}
	if err != nil || equality.Semantic.DeepEqual(have.Spec.Ports, svc.Spec.Ports) {
		return err
	}
	have.Spec.Ports = svc.Spec.Ports
	_, err = services.Update(ctx, have, metav1.UpdateOptions{})
	return err
}

// ensureEndpoints says in both kinds of endpoints where the API is. With
// several servers over one store each would claim it for itself; that needs
// their union and comes with them.
func ensureEndpoints(ctx context.Context, client kubernetes.Interface, addr netip.Addr, port int32) error {
	const ns, name = metav1.NamespaceDefault, "kubernetes"
	addr = addr.Unmap()
	skip := map[string]string{discoveryv1.LabelSkipMirror: "true"}
	subsets := []corev1.EndpointSubset{{
		Addresses: []corev1.EndpointAddress{{IP: addr.String()}},
		Ports:     []corev1.EndpointPort{{Name: "https", Port: port, Protocol: corev1.ProtocolTCP}},
	}}
	endpoints := client.CoreV1().Endpoints(ns)
	ep, err := endpoints.Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = endpoints.Create(ctx, &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: skip}, Subsets: subsets}, metav1.CreateOptions{})
		err = created(err)
	case err == nil && !equality.Semantic.DeepEqual(ep.Subsets, subsets):
		ep.Subsets = subsets
		_, err = endpoints.Update(ctx, ep, metav1.UpdateOptions{})
	}
	if err != nil {
		return err
	}
	want := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressType(family(addr)),
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{addr.String()}, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)}}},
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("https"), Port: &port, Protocol: ptr.To(corev1.ProtocolTCP)}},
	}
	return ensureSlice(ctx, client, want)
}

// ensureSlice replaces the slice when its address type, which cannot change,
// is another one.
func ensureSlice(ctx context.Context, client kubernetes.Interface, want *discoveryv1.EndpointSlice) error {
	slices := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault)
	have, err := slices.Get(ctx, want.Name, metav1.GetOptions{})
	switch {
	case err == nil && have.AddressType != want.AddressType:
		if err := slices.Delete(ctx, want.Name, metav1.DeleteOptions{}); err != nil {
			return err
		}
		fallthrough
	case apierrors.IsNotFound(err):
		_, err = slices.Create(ctx, want, metav1.CreateOptions{})
		return created(err)
	case err != nil:
		return err
	case equality.Semantic.DeepEqual(have.Endpoints, want.Endpoints) && equality.Semantic.DeepEqual(have.Ports, want.Ports):
		return nil
	}
	have.Endpoints, have.Ports = want.Endpoints, want.Ports
	_, err = slices.Update(ctx, have, metav1.UpdateOptions{})
	return err
}

package upstream

import (
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	metav1validation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	podutil "k8s.io/kubernetes/pkg/api/pod"
	"k8s.io/kubernetes/pkg/apis/apps"
	appsvalidation "k8s.io/kubernetes/pkg/apis/apps/validation"
	"k8s.io/kubernetes/pkg/apis/batch"
	batchvalidation "k8s.io/kubernetes/pkg/apis/batch/validation"
)

// workloadRules are those of the groups apps and batch.
func workloadRules() map[runtime.Object]Rules {
	return map[runtime.Object]Rules{
		&appsv1.Deployment{}: rule(
			func(o *apps.Deployment) field.ErrorList {
				return appsvalidation.ValidateDeployment(o, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.Template, nil))
			},
			func(o, old *apps.Deployment) field.ErrorList {
				return appsvalidation.ValidateDeploymentUpdate(o, old, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.Template, &old.Spec.Template))
			},
			appsvalidation.ValidateDeploymentStatusUpdate),
		&appsv1.ReplicaSet{}: rule(
			func(o *apps.ReplicaSet) field.ErrorList {
				return appsvalidation.ValidateReplicaSet(o, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.Template, nil))
			},
			func(o, old *apps.ReplicaSet) field.ErrorList {
				return appsvalidation.ValidateReplicaSetUpdate(o, old, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.Template, &old.Spec.Template))
			},
			appsvalidation.ValidateReplicaSetStatusUpdate),
		&appsv1.StatefulSet{}: rule(
			func(o *apps.StatefulSet) field.ErrorList {
				return appsvalidation.ValidateStatefulSet(o, appsvalidation.StatefulSetValidationOptions{}, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.Template, nil))
			},
			func(o, old *apps.StatefulSet) field.ErrorList {
				return appsvalidation.ValidateStatefulSetUpdate(o, old, appsvalidation.StatefulSetValidationOptions{}, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.Template, &old.Spec.Template))
			},
			appsvalidation.ValidateStatefulSetStatusUpdate),
		&appsv1.DaemonSet{}: rule(
			func(o *apps.DaemonSet) field.ErrorList {
				return appsvalidation.ValidateDaemonSet(o, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.Template, nil))
			},
			func(o, old *apps.DaemonSet) field.ErrorList {
				return appsvalidation.ValidateDaemonSetUpdate(o, old, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.Template, &old.Spec.Template))
			},
			appsvalidation.ValidateDaemonSetStatusUpdate),
		&appsv1.ControllerRevision{}: rule(appsvalidation.ValidateControllerRevisionCreate, appsvalidation.ValidateControllerRevisionUpdate, nil),
		&batchv1.Job{}: rule(
			func(o *batch.Job) field.ErrorList { return batchvalidation.ValidateJobCreate(o, jobOptions(o, nil)) },
			func(o, old *batch.Job) field.ErrorList {
				return batchvalidation.ValidateJobUpdate(o, old, jobOptions(o, old))
			},
			func(o, old *batch.Job) field.ErrorList {
				return batchvalidation.ValidateJobUpdateStatus(o, old, jobStatusOptions(o, old))
			}),
		&batchv1.CronJob{}: rule(
			func(o *batch.CronJob) field.ErrorList {
				return batchvalidation.ValidateCronJobCreate(o, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.JobTemplate.Spec.Template, nil))
			},
			func(o, old *batch.CronJob) field.ErrorList {
				return batchvalidation.ValidateCronJobUpdate(o, old, podutil.GetValidationOptionsFromPodTemplate(&o.Spec.JobTemplate.Spec.Template, &old.Spec.JobTemplate.Spec.Template))
			}, nil),
	}
}

// jobOptions let a suspended job that never ran change where it may run.
func jobOptions(job, old *batch.Job) batchvalidation.JobValidationOptions {
	if old == nil {
		return batchvalidation.JobValidationOptions{
			PodValidationOptions:  podutil.GetValidationOptionsFromPodTemplate(&job.Spec.Template, nil),
			RequirePrefixedLabels: true,
		}
	}
	opts := batchvalidation.JobValidationOptions{
		PodValidationOptions: podutil.GetValidationOptionsFromPodTemplate(&job.Spec.Template, &old.Spec.Template),
	}
	opts.AllowInvalidLabelValueInSelector = opts.AllowInvalidLabelValueInSelector || metav1validation.LabelSelectorHasInvalidLabelValue(old.Spec.Selector)
	suspended := old.Spec.Suspend != nil && *old.Spec.Suspend && old.Status.Active == 0
	idle := old.Status.StartTime == nil || batchvalidation.IsConditionTrue(old.Status.Conditions, batch.JobSuspended)
	opts.AllowMutableSchedulingDirectives = suspended && idle
	opts.AllowMutablePodResources = suspended && idle
	_, name := old.Spec.Template.Labels[batch.JobNameLabel]
	_, uid := old.Spec.Template.Labels[batch.ControllerUidLabel]
	opts.RequirePrefixedLabels = name && uid
	return opts
}

// jobStatusOptions keep a job that is over from coming back to life.
func jobStatusOptions(job, old *batch.Job) batchvalidation.JobStatusValidationOptions {
	became := func(is func(*batch.Job) bool) bool { return is(job) != is(old) }
	finished := became(batchvalidation.IsJobFinished)
	complete := became(batchvalidation.IsJobComplete)
	failed := became(batchvalidation.IsJobFailed)
	return batchvalidation.JobStatusValidationOptions{
		RejectDecreasingFailedCounter:              true,
		RejectDisablingTerminalCondition:           true,
		RejectMutatingCompletionTime:               true,
		RejectFailedJobWithoutFailureTarget:        failed,
		RejectCompleteJobWithoutSuccessCriteriaMet: complete,
		RejectFinishedJobWithActivePods:            finished,
		RejectCompleteJobWithFailedCondition:       complete || failed,
		RejectCompleteJobWithoutCompletionTime:     complete,
		RejectNotCompleteJobWithCompletionTime:     complete,
	}
}
